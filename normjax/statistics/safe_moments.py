"""Mean and variance in one pass over `x`, one collective, and float32: the arithmetic under every layer.

The variance is taken around a shift `s`, a guess at the mean:

    d = sum(x - s) / n,    mean = s + d,    var = sum(|x - s|^2) / n - |d|^2

which is exact for any s, and loses no digits while |d|^2 is not much larger than var. See docs/pages/design.md for what
else was tried, and measured.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Inexact, Real

from normjax._typing import Activations, Mask, promote
from normjax.statistics.sharing import ALONE, Sharing, all_equal, fingerprint

# The name under which statistics can be kept for the backward pass.
STATISTICS = "normjax_statistics"

# A variance v found by way of an offset d from the shift carries an error of about (v + d^2) rounding errors.
# Up to d^2 = 64 v that is 4e-6 of v in float32, inside the 1e-5 that the library promises.
TOLERATED_OFFSET = 64.0


class Moments(NamedTuple):
    """How many elements, their mean, and their biased variance, for each feature.

    `Moments` of disjoint sets of elements combine exactly through `merge_moments`. An empty set has count 0; its mean
    and variance carry no meaning and count for nothing in a merge.

    Attributes:
      count: number of elements, real, of shape `(*features)` or broadcastable to it.
      mean: their mean, `(*features)`; complex where x is.
      var: mean of `|x - mean|^2`, `(*features)`; real, not negative.
    """

    count: Real[ArrayLike, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Inexact[Array, "..."]
    var: Inexact[Array, "..."]


class _How(NamedTuple):
    """The static part of a reduction."""

    axes: tuple[int, ...]
    sharing: Sharing = ALONE
    epsilon: float = 0.0

    def expand(self, statistic: Array) -> Array:
        return jnp.expand_dims(statistic, self.axes)


def widen(x: Activations) -> Activations:
    """Casts to the precision that statistics are computed in: at least float32."""
    return x.astype(promote(x.dtype, jnp.float32))


def safe_moments(
    x: Activations,
    wide: Activations,
    axes: tuple[int, ...],
    *,
    shift: Inexact[Array, "..."] | None = None,
    mask: Mask | None = None,
    sharing: Sharing = ALONE,
    epsilon: float = 0.0,
) -> Moments:
    """Returns the moments of `wide`, which is `x` in at least float32.

    Both are taken because of what XLA does with them: gradients flow through `wide`, so that they are added up before
    they are rounded to the dtype of `x`; the branch of the second pass reads `x`, since an operand of a branch is
    written out in the dtype that it has.

    Args:
      x: the input as it came.
      wide: `widen(x)`.
      axes: non-negative reduction axes.
      shift: a guess at the mean that does not depend on `x` (so that XLA can fuse the statistics into whatever
        computes `x`), of the features' shape. The result does not depend on it, the cost does. None: zero.
      mask: None, or bool with the rank of `x`.
      sharing: the devices to share with.
      epsilon: what the caller adds to the variance: errors far below it do not call for a second pass.
    """
    how = _How(axes, sharing, epsilon)
    features = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    if shift is None:
        shift = jnp.zeros(features, wide.dtype)
    shift = jnp.broadcast_to(lax.stop_gradient(shift).astype(wide.dtype), features)
    return _compiled(how, wide, lax.stop_gradient(x), mask, shift)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _safe_moments(how: _How, wide: Array, x: Array, mask: Array | None, shift: Array) -> Moments:
    """One pass around `shift`; and where it cancelled, a second one, around the mean that the first one found."""
    known_equal = how.sharing.knows_equal(shift)
    riders = () if known_equal else (_local_count(how, x, mask).astype(shift.dtype) * shift, fingerprint(shift))
    first, offset, summed = _shifted_moments(how, wide, mask, shift, riders)
    cancelled = ~(abs2(offset) <= TOLERATED_OFFSET * (first.var + how.epsilon))
    unsafe = jnp.any(cancelled)
    if not known_equal:
        # Devices that came with different shifts (replicas that trained apart) agree on the mean, not on the variance.
        agreed = all_equal(summed[1], how.sharing.size)
        mean = summed[0] / jnp.maximum(first.count, 1).astype(wide.dtype) + offset
        first = first._replace(mean=jnp.where(agreed, first.mean, mean))
        unsafe |= ~agreed

    def second_pass(x: Array, mask: Array | None, first: Moments) -> Moments:
        return _shifted_moments(how, widen(x), mask, first.mean)[0]

    # The predicate is made of sums over the devices alone, so all of them take the same branch,
    # and the collective within it finds its partners.
    return lax.cond(unsafe, second_pass, lambda x, mask, first: first, x, mask, first)


@_safe_moments.defjvp
def _safe_moments_jvp(how: _How, primals: tuple, tangents: tuple) -> tuple[Moments, Moments]:
    r"""The derivative knows nothing of shifts and branches.

    .. math:: d\mu = \frac1n \sum_i dx_i, \qquad
              d\sigma^2 = \frac2n \sum_i \mathrm{Re}\,\overline{(x_i - \mu)}\, dx_i
    """
    wide, x, mask, shift = primals
    result = jax.tree.map(_named, _safe_moments(how, wide, x, mask, shift))
    dx = _masked(tangents[0], mask)
    centered = _masked(wide - how.expand(result.mean), mask)
    n = jnp.maximum(result.count, 1)
    mean_dot, var_dot = how.sharing.sum(jnp.sum(dx, how.axes), jnp.sum(_real_product(centered, dx), how.axes))
    return result, Moments(jnp.zeros_like(result.count), mean_dot / n.astype(mean_dot.dtype), 2 * var_dot / n)


# Compiled so that eager calls, too, trace and compile the branch once.
_compiled = jax.jit(_safe_moments, static_argnums=0, inline=True)


def _shifted_moments(
    how: _How, wide: Array, mask: Array | None, shift: Array, riders: tuple[Array, ...] = ()
) -> tuple[Moments, Array, tuple[Array, ...]]:
    """Returns the moments, the mean's offset from the shift, and the sums of what rode along in the collective."""
    centered = _masked(wide - how.expand(shift), mask)
    # XLA's CPU reductions compute their input on the fly unless two of them share it: give each its own.
    again = _masked(wide - how.expand(lax.optimization_barrier(shift)), mask)
    sums = jnp.sum(centered, how.axes), jnp.sum(abs2(again), how.axes)
    if mask is None:
        count = _local_count(how, wide, mask) * how.sharing.size
        total, squares, *summed = how.sharing.sum(*sums, *riders)
    else:
        total, squares, count, *summed = how.sharing.sum(*sums, _local_count(how, wide, mask), *riders)
    count = jnp.broadcast_to(count, squares.shape)
    n = jnp.maximum(count, 1)
    offset = total / n.astype(total.dtype)
    var = jnp.maximum(squares / n - abs2(offset), 0)
    return Moments(count, shift + offset, var), offset, tuple(summed)


def _local_count(how: _How, x: Array, mask: Array | None) -> Array:
    """How many elements count on this device: real, broadcastable to the features."""
    dtype = jnp.finfo(promote(x.dtype, jnp.float32)).dtype
    if mask is None:
        return jnp.asarray(math.prod(x.shape[axis] for axis in how.axes), dtype)
    repeats = math.prod(x.shape[axis] for axis in how.axes if mask.shape[axis] == 1)
    seen = jnp.sum(mask, [axis for axis in how.axes if mask.shape[axis] != 1], jnp.int32, keepdims=True)
    return (seen * repeats).squeeze(how.axes).astype(dtype)


def _named(statistic: Array) -> Array:
    if jnp.iscomplexobj(statistic):  # which jax.checkpoint cannot keep as it is
        return lax.complex(_named(statistic.real), _named(statistic.imag))
    return checkpoint_name(statistic, STATISTICS)


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else jnp.where(mask, x, 0)


def abs2(x: Array) -> Array:
    """Returns |x|^2, real."""
    return _real_product(x, x)


def _real_product(a: Array, b: Array) -> Array:
    """Re(conj(a) b), without the complex product where both are real."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b
