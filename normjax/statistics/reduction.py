"""Reduces arrays to moments, from which all statistics are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax._typing import Mask, is_weight, widen
from normjax.platforms import all_true, by_platform, is_small, rounded, unless_mapped
from normjax.platforms.cpu import separate_if_narrow, separate_operands
from normjax.platforms.gpu import sample
from normjax.platforms.plain import PLAIN, custom_jvp
from normjax.statistics.devices import ALONE
from normjax.statistics.elements import (
    Input,
    abs2,
    masked,
    named,
    real_product,
    weighted,
)
from normjax.statistics.merge import merge_over
from normjax.statistics.spec import Moments, Spec, or_one

# A variance v that is computed around zero has an error of about (v + mean^2) rounding errors. For
# mean^2 = 64 v and a hundred thousand elements in float32, the measured error is 2e-5 v.
TOLERATED_MEAN_SQUARE = 64.0


def batch_moments(spec: Spec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments of x in one pass around zero, or in two if the first pass cancelled.

    On several devices, the second pass needs another collective, so one decision is made for all
    features. On GPUs, and for small arrays on one device, there is no branch, but one pass around
    the mean of a sample. See `example_moments` for per-example statistics.
    """
    return moments_by(_of_batch, spec, x, mask)


def _of_batch(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    if PLAIN.value:
        return two_passes(spec, x, mask)
    sampled = partial(around_sample, spec)
    if not is_small(x):
        return _of_large(spec, x, mask)
    if spec.devices != ALONE:  # a vmap rule does not know the names of mapped axes
        return sampled(x, mask)
    # Under vmap, many small arrays are one large array.
    return unless_mapped(sampled, partial(_of_large, spec))(x, mask)


def _of_large(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    """Returns the moments of a large array, or of many small ones under vmap."""
    guarded, sampled = partial(one_pass_if_safe, spec), partial(around_sample, spec)
    return by_platform(guarded, x, mask, gpu=sampled)


def moments_by(forward: Callable[..., Moments], spec: Spec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments from `forward(spec, x, mask)`, with the derivative of the formula."""
    moments = _moments(forward, spec, x, mask)
    return moments._replace(count=spec.count(x.x)) if mask is None else moments


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _moments(forward: Callable[..., Moments], spec: Spec, x: Input, mask: Mask | None) -> Moments:
    return forward(spec, x.x32 if PLAIN.value else x.x, mask)


@_moments.defjvp
def _moments_jvp(
    forward: Callable[..., Moments], spec: Spec, primals: tuple, tangents: tuple
) -> tuple[Moments, Moments]:
    """Returns the derivative of the formula, independent of passes and branches."""
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
    x_dot = x_dot if mask is None else weighted(masked(x_dot, mask), mask)
    n = spec.count(x) if mask is None else moments.count
    n = or_one(n)
    centered = widen(x) - spec.expand(moments.mean)
    factor: Any = 2.0
    if spec.unit(x) != 1:
        # Divides by the deviation here and multiplies by it at the end. XLA would move a constant
        # factor from the elements to the sum, where it underflows.
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
    apart = masked(abs2(offset * spec.unit(x)) - spec.expand(moments.var), mask)
    mask_dot = jnp.where(mask > 0, mask_dot, 0).astype(apart.dtype)
    sums = spec.local_sum(offset * mask_dot), spec.local_sum(apart * mask_dot)
    count = spec.local_count(x, mask_dot)
    mean_dot, var_dot, count_dot = spec.devices.sum(*sums, count)
    n = or_one(moments.count)
    return Moments(count_dot, ratio(mean_dot, n), var_dot / n)


def one_pass_if_safe(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    r"""Computes the moments around zero, and again around their mean if it is far from zero.

    .. math:: \mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac1n \sum_i |x_i|^2 - |\mu|^2

    The predicate depends only on sums over the devices, so all devices take the same branch and run
    the same collectives.
    """
    count, mean, square = means(spec, x, mask)
    mean_squared = abs2(mean)
    var = square - mean_squared
    scale = TOLERATED_MEAN_SQUARE
    # The second pass scales squares, so that their sum does not overflow.
    near = mean_squared <= scale * var + scale * spec.least_variance
    safe = all_true(near & (var < jnp.inf))

    def keep(x: Array, mask: Mask | None, first: Moments) -> tuple[Array, Array]:
        unit = spec.unit(x)
        return first.mean, first.var if unit == 1 else first.var * unit**2

    def second_pass(x: Array, mask: Mask | None, first: Moments) -> tuple[Array, Array]:
        return around(spec, x, mask, first.mean, first.count)[1:]

    mean, var = lax.cond(safe, keep, second_pass, x, mask, Moments(count, mean, var))
    return Moments(count, mean, jnp.maximum(var, 0.0))


def around_sample(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    r"""Computes the moments in one pass around the mean s of a sample of x, on each device.

    If k of n elements are sampled, they alone contribute :math:`\frac kn |\mu - s|^2` to the
    variance. So the variance has an error of at most 1 + n / k rounding errors, whatever x is. With
    a mask, no sampled element may count, so the sample is all of x. Devices then merge their
    moments.
    """
    own = replace(spec, devices=ALONE)
    sampled = sample(x, spec.axes) if mask is None else masked(x, mask)
    count, reference = total_over_count(own, widen(sampled), mask)
    found = around(own, x, mask, reference, count, near=False)
    if spec.devices == ALONE:
        return found
    merged = merge_over(spec.devices, found._replace(count=own.count(x) if mask is None else count))
    if count is None:
        return merged._replace(count=None)
    # Features that share a mask have one count.
    return merged._replace(count=lax.slice(merged.count, [0] * count.ndim, count.shape))


def two_passes(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    """Computes the mean, then the moments around it."""
    (x,) = separate_operands(x, 1)
    count, mean = total_over_count(spec, masked(widen(x), mask), mask)
    return around(spec, x, mask, mean, count)


def in_a_row(spec: Spec, x: Array, mask: Mask | None = None) -> Moments:
    r"""Computes the mean, corrects it, and computes the squares around it, without a mask.

    .. math:: m = \frac1n \sum_i x_i, \qquad \mu = m + \frac1n \sum_i (x_i - m), \qquad
              \sigma^2 = \frac1n \sum_i |x_i - \mu|^2

    If the last axes are reduced, XLA's GPU backend fuses this and the normalization into one
    kernel, which reads x once. In `around`, two sums share an operand, which results in three
    kernels.
    """
    n = or_one(spec.count(x))
    wide = widen(x)
    mean = spec.local_sum(wide) / n
    mean = mean + spec.local_sum(wide - spec.expand(mean)) / n
    squares = abs2((wide - spec.expand(mean)) * spec.unit(x))
    found: Any = None, mean, spec.local_sum(squares) / n
    return Moments(*found)


def around(
    spec: Spec,
    x: Array,
    mask: Mask | None,
    reference: Array,
    count: Any,
    *,
    near: bool = True,
) -> Moments:
    r"""Computes the moments around a reference r, near the mean or not; the count is known.

    .. math:: \delta = \frac1n \sum_i (x_i - r), \qquad \mu = r + \delta, \qquad
              \sigma^2 = \frac1n \sum_i |x_i - r|^2 - |\delta|^2

    The computed mean of many numbers far from zero differs from the true mean by more than its last
    digit. So r is corrected by delta, even if it was computed as the mean.
    """
    _, offset, square = means(spec, x, mask, reference, count)
    unit = spec.unit(x)
    shift = offset if unit == 1 else offset * unit
    if near:
        correction = abs2(shift)
    else:
        # Rounded, since XLA would square the sum before it divides by n, which may overflow. The
        # largest number avoids inf - inf.
        correction = jnp.minimum(abs2(rounded(shift)), jnp.finfo(square.dtype).max)
    var = square - correction
    found: Any = count, reference + offset, jnp.maximum(var, 0.0)
    return Moments(*found)


def means(
    spec: Spec,
    x: Array,
    mask: Mask | None,
    reference: Array | None = None,
    count: Array | None = None,
) -> tuple[Any, Array, Array]:
    """Returns the count (None if all count), the mean and the mean square of x in one pass.

    With a reference, the count is given as well, x is centered around the reference, and squares
    are computed in their own unit; the mean square is in the unit of variances. For an empty set,
    all results are 0.
    """
    unit = 1.0 if reference is None else spec.unit_of_squares(x)
    own, other = separate_if_narrow(x, 2)
    shared = other is own
    # Also separate, since a shared reference would be broadcast to x's size in memory.
    references = [reference] * 2 if shared or reference is None else separate_operands(reference, 2)
    values = _centered(spec, own, mask, references[0])
    squared = values if shared else _centered(spec, other, mask, references[1])
    squares = abs2(squared if unit == 1 else squared * unit)
    if mask is not None:
        values, squares = weighted(values, mask), weighted(squares, mask)
    sums = spec.local_sum(values), spec.local_sum(squares)
    if mask is None:
        n: Any = spec.count(x)
        total, square = spec.devices.sum(*sums)
    elif count is None:
        total, square, n = spec.devices.sum(*sums, spec.local_count(x, mask))
        count = n
    else:
        total, square = spec.devices.sum(*sums)
        n = count
    n = or_one(n)
    # A single division, since XLA would turn a division by a power of two into a factor of the
    # elements, whose squares would overflow.
    divisor = n if reference is None else n * (unit / spec.unit(x)) ** 2
    return count, ratio(total, n), square / divisor


def _centered(spec: Spec, x: Array, mask: Mask | None, reference: Array | None) -> Array:
    """Returns x minus the reference, with 0 for elements that do not count."""
    centered = widen(x) if reference is None else widen(x) - spec.expand(reference)
    return centered if mask is None else masked(centered, mask)


def total_over_count(spec: Spec, values: Array, mask: Mask | None) -> tuple[Array | None, Array]:
    """Returns the count (None if all count), and the mean of elements; masked ones are 0 in x."""
    if mask is None:
        (total,) = spec.devices.sum(spec.local_sum(values))
        return None, ratio(total, or_one(spec.count(values)))
    sums = spec.local_sum(weighted(values, mask)), spec.local_count(values, mask)
    total, count = spec.devices.sum(*sums)
    return count, ratio(total, or_one(count))


def ratio(total: Array, n: Any) -> Array:
    """Divides a total by a count, which may be a float or an array."""
    return total / (n if isinstance(n, float) else n.astype(total.dtype))
