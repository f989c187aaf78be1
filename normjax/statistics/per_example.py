"""Computes per-example statistics, without communication between devices.

`batch_moments` makes one decision for all features whether to take a second pass. For per-example
statistics, this decision would require a collective in layers that need none, and a single example
far from zero would cause a second pass for all examples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax._typing import Mask, is_weight, is_wide, widen
from normjax.platforms import all_true, by_platform, one_device
from normjax.platforms.cpu import separate_operands
from normjax.platforms.gpu import reduces_rows
from normjax.platforms.plain import PLAIN, custom_jvp
from normjax.statistics.devices import ALONE
from normjax.statistics.elements import Input, abs2, masked, named, real_product, weighted
from normjax.statistics.reduction import (
    around_sample,
    in_a_row,
    moments_by,
    one_pass_if_safe,
    total_over_count,
    two_passes,
)
from normjax.statistics.spec import Moments, Spec, or_one


class ExampleSpec(Spec):
    """A spec with variances in the unit of squares, since they are not stored."""

    def unit(self, x: Array) -> float:
        """Returns the unit of squares."""
        return self.unit_of_squares(x)

    @property
    def in_two_passes(self) -> bool:
        """Whether to compute the mean first and then the squares around it, on every platform."""
        return False


def example_moments(spec: ExampleSpec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments of x, with the variance in the unit of `spec`; 0 for an empty set.

    On several devices, each of the two passes has a collective.
    """
    return moments_by(_moments, spec, x, mask)


def _moments(spec: ExampleSpec, x: Array, mask: Mask | None) -> Moments:
    in_one_kernel = mask is None and reduces_rows(x, spec.axes)
    return _phrased(spec, x, mask, gpu=in_a_row if in_one_kernel else around_sample)


def _phrased(
    spec: ExampleSpec,
    x: Array,
    mask: Mask | None,
    gpu: Callable[[Spec, Array, Mask | None], Moments],
) -> Moments:
    """Takes one pass around a sample, or two passes on CPUs, where the first pass caches a row."""
    if PLAIN.value or spec.devices != ALONE or spec.in_two_passes:
        return two_passes(spec, x, mask)
    cpu = one_pass_if_safe if one_device() else two_passes
    sampled = partial(around_sample, spec)
    return by_platform(sampled, x, mask, cpu=partial(cpu, spec), gpu=partial(gpu, spec))


def kept_moments(spec: ExampleSpec, x: Input, mask: None) -> Moments:
    """Returns the moments of x, like `example_moments`, to be stored for the backward pass.

    On GPUs they get their own kernel, since the kernel that computes y cannot return them.
    """
    return moments_by(_kept_moments, spec, x, mask)


def _kept_moments(spec: ExampleSpec, x: Array, mask: None) -> Moments:
    return _phrased(spec, x, mask, gpu=around_sample)


def mean_square(spec: Spec, x: Input, mask: Mask | None) -> tuple[Array, Array]:
    r"""Returns the number of elements and their mean square :math:`\frac1n \sum_i |u x_i|^2`.

    u is the unit of `spec`. If no element counts, the mean square is 0.
    """
    count, square = _mean_square(spec, x, mask)
    return (spec.count(x.x) if mask is None else count), square


@partial(custom_jvp, nondiff_argnums=(0,))
def _mean_square(spec: Spec, x: Input, mask: Mask | None) -> tuple[Array | None, Array]:
    (own,) = separate_operands(x.x32 if PLAIN.value else x.x, 1)
    if PLAIN.value or is_wide(own) or spec.devices != ALONE or not one_device():
        return _mean_square_in(spec, spec.unit(own), own, mask)
    safe = partial(_mean_square_if_finite, spec)
    return by_platform(partial(_mean_square_in, spec, spec.unit(own)), own, mask, cpu=safe)


def _mean_square_in(
    spec: Spec, unit: float, x: Array, mask: Mask | None
) -> tuple[Array | None, Array]:
    """Returns the count, and the mean square of x times the unit."""
    value = masked(widen(x), mask)
    return total_over_count(spec, abs2(value if unit == 1 else value * unit), mask)


def _mean_square_if_finite(spec: Spec, x: Array, mask: Mask | None) -> tuple[Array | None, Array]:
    """Squares x itself unless that overflows, since XLA then needs no float32 copy of x."""
    count, square = _mean_square_in(spec, 1.0, x, mask)
    unit = spec.unit(x)

    def keep(x: Array, mask: Mask | None, square: Array) -> Array:
        return square * unit**2

    def again(x: Array, mask: Mask | None, square: Array) -> Array:
        return _mean_square_in(spec, unit, x, mask)[1]

    return count, lax.cond(all_true(square < jnp.inf), keep, again, x, mask, square)


@_mean_square.defjvp
def _mean_square_jvp(spec: Spec, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    x, mask = primals
    count, square = _mean_square(spec, x, mask)
    dot = _mean_square_dot(spec, count, square, x.x, mask, tangents[0].x32)
    count_dot = jax.tree.map(jnp.zeros_like, count)
    if is_weight(mask):
        count_dot, by_weights = _mean_square_dot_by_weights(
            spec, (count, square), x.x, mask, tangents[1]
        )
        dot += by_weights
    return (count, named(square)), (count_dot, dot)


def _mean_square_dot(
    spec: Spec, count: Array | None, square: Array, x: Array, mask: Mask | None, x_dot: Array
) -> Array:
    r"""Returns :math:`\frac{2 u^2}n \sum_i w_i \mathrm{Re}\,\overline{x_i}\, dx_i`."""
    (x,) = separate_operands(x, 1)
    deviation = spec.deviation(square)
    inverse = spec.expand((1 / deviation).astype(widen(x).dtype))
    normalized = masked(widen(x) * inverse, mask)
    product = real_product(normalized, weighted(masked(x_dot, mask), mask))
    (total,) = spec.devices.sum(spec.local_sum(product))
    n = or_one(spec.count(x) if count is None else count)
    return 2 * spec.unit(x) ** 2 * deviation * total / n


def _mean_square_dot_by_weights(
    spec: Spec, found: tuple[Any, Array], x: Array, mask: Mask, mask_dot: Array
) -> tuple[Array, Array]:
    r"""Returns :math:`dn` and :math:`\frac1n \sum_i (|x_i|^2 - s)\, dw_i` of the mean square s."""
    count, square = found
    apart = abs2(masked(widen(x), mask) * spec.unit(x)) - spec.expand(square)
    mask_dot = jnp.where(mask > 0, mask_dot, 0).astype(apart.dtype)
    total = spec.local_sum(masked(apart, mask) * mask_dot)
    total, count_dot = spec.devices.sum(total, spec.local_count(x, mask_dot))
    return count_dot, total / or_one(count)
