"""Reduces arrays to moments: the basis of every statistic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax._typing import Mask, is_weight, widen
from normjax.platforms.cpu import separate_if_narrow, separate_operands
from normjax.platforms.plain import custom_jvp, is_plain
from normjax.statistics.elements import (
    Input,
    abs2,
    masked,
    named,
    real_product,
    times,
    weighted,
)
from normjax.statistics.spec import Moments, Spec, or_one

# A variance v that is computed around zero has an error of about (v + mean^2) rounding errors.
# Up to mean^2 = 64 v, over a hundred thousand elements, 2e-5 of v was measured in float32.
TOLERATED_MEAN_SQUARE = 64.0


def batch_moments(spec: Spec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments of x: one pass around zero, and a second one if the first one cancelled.

    On several devices the second pass is another collective, so one decision is made for all
    features. See `example_moments` for statistics of each example.
    """
    return moments_by(one_pass_if_safe, spec, x, mask)


def moments_by(forward: Callable[..., Moments], spec: Spec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments by `forward(spec, x, mask)`, with the derivative of the formula."""
    moments = _moments(forward, spec, x, mask)
    return moments._replace(count=spec.count(x.x)) if mask is None else moments


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _moments(forward: Callable[..., Moments], spec: Spec, x: Input, mask: Mask | None) -> Moments:
    return forward(spec, x.x32 if is_plain() else x.x, mask)


@_moments.defjvp
def _moments_jvp(
    forward: Callable[..., Moments], spec: Spec, primals: tuple, tangents: tuple
) -> tuple[Moments, Moments]:
    """Returns the derivative of the formula, which does not depend on passes and branches."""
    x, mask = primals
    moments = jax.tree.map(named, _moments(forward, spec, x, mask))
    dot = moments_dot(spec, moments, x.x, mask, tangents[0].x32)
    if is_weight(mask):
        by_weights = _moments_dot_by_weights(spec, moments, x.x, mask, tangents[1])
        dot = jax.tree.map(jnp.add, dot, by_weights)
    return moments, dot


def moments_dot(spec: Spec, moments: Moments, x: Array, mask: Mask | None, x_dot: Array) -> Moments:
    r"""Returns the derivative of the moments of x along `x_dot`, however they were computed.

    .. math:: d\mu = \frac1n \sum_i w_i dx_i, \qquad
              d\sigma^2 = \frac2n \sum_i w_i \mathrm{Re}\,\overline{(x_i - \mu)}\, dx_i
    """
    (x,) = separate_if_narrow(x, 1)
    x_dot = weighted(masked(x_dot, mask), mask)
    n = spec.count(x) if mask is None else moments.count
    n = or_one(n)
    centered = widen(x) - spec.expand(moments.mean)
    factor: Any = 2.0
    if spec.unit(x) != 1:
        # In deviations here, and without them in the end: XLA would move a constant unit from the
        # elements to the sum, where it underflows.
        deviation = spec.deviation(moments.var)
        centered *= spec.expand((1 / deviation).astype(centered.dtype))
        factor = deviation * (2 * spec.unit(x) ** 2)
    product = real_product(masked(centered, mask), x_dot)
    mean_dot, total = spec.devices.sum(spec.local_sum(x_dot), spec.local_sum(product))
    count_dot: Any = jax.tree.map(jnp.zeros_like, moments.count)
    var_dot = factor * total / n
    return Moments(count_dot, ratio(mean_dot, n), var_dot)


def _moments_dot_by_weights(
    spec: Spec, moments: Moments, x: Array, mask: Mask, mask_dot: Array
) -> Moments:
    r"""Returns the derivative of the moments of x along the weights' :math:`dw`.

    .. math:: dn = \sum_i dw_i, \qquad d\mu = \frac1n \sum_i (x_i - \mu)\, dw_i, \qquad
              d\sigma^2 = \frac1n \sum_i \left(|x_i - \mu|^2 - \sigma^2\right) dw_i
    """
    offset = masked(widen(x) - spec.expand(moments.mean), mask)
    apart = masked(abs2(times(offset, spec.unit(x))) - spec.expand(moments.var), mask)
    mask_dot = jnp.where(mask > 0, mask_dot, 0).astype(apart.dtype)
    sums = spec.local_sum(offset * mask_dot), spec.local_sum(apart * mask_dot)
    count = spec.local_count(x, mask_dot)
    mean_dot, var_dot, count_dot = spec.devices.sum(*sums, count)
    n = or_one(moments.count)
    return Moments(count_dot, ratio(mean_dot, n), var_dot / n)


def one_pass_if_safe(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    r"""Takes the moments around zero, and again around their mean if it is far from zero.

    .. math:: \mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac1n \sum_i |x_i|^2 - |\mu|^2

    The predicate only depends on sums over the devices, so all devices take the same branch, and
    with it the same collective.
    """
    count, mean, square = means(spec, x, mask)
    if is_plain():
        count, mean, var = around(spec, x, mask, Moments(count, mean, square))
        return Moments(count, mean, jnp.maximum(var, 0))
    mean_squared = abs2(mean)
    var = square - mean_squared
    scale = TOLERATED_MEAN_SQUARE
    # The second pass has a unit for squares whose sum overflows.
    safe = jnp.all((mean_squared <= scale * var + scale * spec.least_variance) & (var < jnp.inf))

    def keep(x: Array, mask: Mask | None, first: Moments) -> tuple[Array, Array]:
        return first.mean, times(first.var, spec.unit(x) ** 2)

    def second_pass(x: Array, mask: Mask | None, first: Moments) -> tuple[Array, Array]:
        return around(spec, x, mask, first)[1:]

    mean, var = lax.cond(safe, keep, second_pass, x, mask, Moments(count, mean, var))
    return Moments(count, mean, jnp.maximum(var, 0))


def around(spec: Spec, x: Array, mask: Mask | None, first: Moments) -> Moments:
    r"""Takes the moments around a mean m that a first pass found, and corrects it.

    .. math:: \delta = \frac1n \sum_i (x_i - m), \qquad \mu = m + \delta, \qquad
              \sigma^2 = \frac1n \sum_i |x_i - m|^2 - |\delta|^2

    The mean of many numbers far from zero has an error of more than its last digit.
    """
    count, offset, square = means(spec, x, mask, first)
    var = square - abs2(times(offset, spec.unit(x)))
    return Moments(count, first.mean + offset, var)


def means(
    spec: Spec, x: Array, mask: Mask | None, first: Moments | None = None
) -> tuple[Any, Array, Array]:
    """Returns the count (None: all), the mean, and the mean square of x in one pass.

    Given the moments of a first pass, x is centered around their mean, and the squares are taken in
    their own unit: the mean square is then in the unit of variances. For an empty set they are 0.
    """
    unit = 1.0 if first is None else spec.unit_of_squares(x)
    divisor = 1.0 if first is None else (unit / spec.unit(x)) ** 2
    values, squares = _values(spec, x, mask, first, unit)
    sums = spec.local_sum(values), spec.local_sum(squares)
    count = None
    if mask is None:
        total, square = spec.devices.sum(*sums)
    elif first is None:
        total, square, count = spec.devices.sum(*sums, spec.local_count(x, mask))
    else:
        total, square = spec.devices.sum(*sums)
        count = first.count
    n = or_one(spec.count(x) if count is None else count)
    return count, ratio(total, n), square / times(n, divisor)


def _values(
    spec: Spec, x: Array, mask: Mask | None, first: Moments | None, unit: float
) -> tuple[Array, Array]:
    """Returns the terms of the sum, and their squares; 0 for elements that do not count."""
    own, other = separate_if_narrow(x, 2)
    if first is None:
        reference, again = None, None
    else:
        # Also separate: a shared one would be broadcast to the size of x, and written to memory.
        reference, again = (
            separate_operands(first.mean, 2) if other is not own else [first.mean] * 2
        )
    value = _value(spec, own, mask, reference)
    squared = value if other is own else _value(spec, other, mask, again)
    return weighted(value, mask), weighted(abs2(times(squared, unit)), mask)


def _value(spec: Spec, x: Array, mask: Mask | None, reference: Array | None) -> Array:
    x32 = widen(x)
    return masked(x32 if reference is None else x32 - spec.expand(reference), mask)


def ratio(total: Array, n: Any) -> Array:
    """Returns a total over a count, which may be a float or an array."""
    return total / (n if isinstance(n, float) else n.astype(total.dtype))
