"""Statistics that each example has of its own, so that examples on different devices never wait.

`batch_moments` asks of all features at once whether a second pass is due. For statistics of
examples that question would be a collective in layers that need none, and one example far from
zero would cost all of them the second pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from normjax._typing import Mask, widen
from normjax.platforms import on_cpu, one_device
from normjax.platforms.cpu import separate_operands
from normjax.platforms.plain import custom_jvp, is_plain
from normjax.statistics.devices import ALONE
from normjax.statistics.reduction import (
    Input,
    Moments,
    Spec,
    abs2,
    around,
    at_least_one,
    masked,
    moments_by,
    named,
    one_pass_if_safe,
    real_product,
)


def example_moments(spec: Spec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments of x; of an empty set they are 0.

    Devices that share do so in each of the two passes.
    """
    return moments_by(_moments, spec, x, mask)


def _moments(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    """Takes two passes: a row that was just read is at hand. On a single CPU, one if it is safe."""
    if spec.devices == ALONE and one_device():
        return on_cpu(partial(one_pass_if_safe, spec), partial(two_passes, spec), x, mask)
    return two_passes(spec, x, mask)


def two_passes(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    """Takes the mean, then the moments around it."""
    (x,) = separate_operands(x, 1)
    count, mean = _mean(spec, masked(widen(x), mask), mask)
    first: Any = count, mean, mean.real
    return around(spec, x, mask, Moments(*first))


def mean_square(spec: Spec, x: Input, mask: Mask | None) -> tuple[Array, Array]:
    r"""Returns how many elements count, and the mean of their squares :math:`\frac1n \sum_i |x_i|^2`.

    Of none, the mean is 0.
    """
    count, square = _mean_square(spec, x, mask)
    return (spec.count(x.x) if mask is None else count), square


@partial(custom_jvp, nondiff_argnums=(0,))
def _mean_square(spec: Spec, x: Input, mask: Mask | None) -> tuple[Array | None, Array]:
    (own,) = separate_operands(x.x32 if is_plain() else x.x, 1)
    return _mean(spec, abs2(masked(widen(own), mask)), mask)


@_mean_square.defjvp
def _mean_square_jvp(spec: Spec, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    x, mask = primals
    count, square = _mean_square(spec, x, mask)
    dot = _mean_square_dot(spec, count, x.x, mask, tangents[0].x32)
    return (count, named(square)), (jax.tree.map(jnp.zeros_like, count), dot)


def _mean_square_dot(
    spec: Spec, count: Array | None, x: Array, mask: Mask | None, x_dot: Array
) -> Array:
    r"""Returns :math:`\frac2n \sum_i \mathrm{Re}\,\overline{x_i}\, dx_i`."""
    (x,) = separate_operands(x, 1)
    product = real_product(masked(widen(x), mask), masked(x_dot, mask))
    (total,) = spec.devices.sum(spec.local_sum(product))
    return 2 * total / at_least_one(spec.count(x) if count is None else count)


def _mean(
    spec: Spec, values: Inexact[Array, "..."], mask: Mask | None
) -> tuple[Array | None, Array]:
    """Returns how many elements count (None: all), and their mean; what does not count is zero."""
    total = spec.local_sum(values)
    if mask is None:
        (total,) = spec.devices.sum(total)
        count, n = None, spec.count(values)
    else:
        total, count = spec.devices.sum(total, spec.local_count(values, mask))
        n = count
    n = at_least_one(n)
    return count, total / (n if isinstance(n, float) else n.astype(total.dtype))
