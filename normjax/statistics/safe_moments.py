"""Mean and variance in one pass over `x`, one collective, and float32: the arithmetic of statistics over a batch.

The variance is taken around a shift `s`, a guess at the mean:

    d = sum(x - s) / n,    mean = s + d,    var = sum(|x - s|^2) / n - |d|^2

which is exact for any s, and loses no digits while |d|^2 is not much larger than var. See docs/pages/design.md for what
else was tried, and measured.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from normjax._typing import Activations, Mask
from normjax.statistics.reduction import Moments, Reduction, abs2, masked, named, widen
from normjax.statistics.sharing import ALONE, Sharing, all_equal, fingerprint

# A variance v found by way of an offset d from the shift carries an error of about (v + d^2) rounding errors.
# Up to d^2 = 64 v that is 4e-6 of v in float32, inside the 1e-5 that the library promises.
TOLERATED_OFFSET = 64.0


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
    how = Reduction(axes, sharing, epsilon)
    features = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    if shift is None:
        shift = jnp.zeros(features, wide.dtype)
    shift = jnp.broadcast_to(lax.stop_gradient(shift).astype(wide.dtype), features)
    return _compiled(how, wide, lax.stop_gradient(x), mask, shift)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _safe_moments(how: Reduction, wide: Array, x: Array, mask: Array | None, shift: Array) -> Moments:
    """One pass around `shift`; and where it cancelled, a second one, around the mean that the first one found."""
    known_equal = how.sharing.knows_equal(shift)
    riders = () if known_equal else (how.local_count(x, mask).astype(shift.dtype) * shift, fingerprint(shift))
    first, offset, summed = shifted_moments(how, wide, mask, shift, riders)
    cancelled = ~(abs2(offset) <= TOLERATED_OFFSET * (first.var + how.epsilon))
    unsafe = jnp.any(cancelled)
    if not known_equal:
        # Devices that came with different shifts (replicas that trained apart) agree on the mean, not on the variance.
        agreed = all_equal(summed[1], how.sharing.size)
        mean = summed[0] / jnp.maximum(first.count, 1).astype(wide.dtype) + offset
        first = first._replace(mean=jnp.where(agreed, first.mean, mean))
        unsafe |= ~agreed

    def second_pass(x: Array, mask: Array | None, first: Moments) -> Moments:
        return shifted_moments(how, widen(x), mask, first.mean)[0]

    # The predicate is made of sums over the devices alone, so all of them take the same branch,
    # and the collective within it finds its partners.
    return lax.cond(unsafe, second_pass, lambda x, mask, first: first, x, mask, first)


@_safe_moments.defjvp
def _safe_moments_jvp(how: Reduction, primals: tuple, tangents: tuple) -> tuple[Moments, Moments]:
    """The derivative knows nothing of shifts and branches."""
    wide, x, mask, shift = primals
    result = jax.tree.map(named, _safe_moments(how, wide, x, mask, shift))
    return result, how.moments_dot(result, wide, mask, tangents[0])


# Compiled so that eager calls, too, trace and compile the branch once.
_compiled = jax.jit(_safe_moments, static_argnums=0, inline=True)


def shifted_moments(
    how: Reduction, wide: Array, mask: Array | None, shift: Array, riders: tuple[Array, ...] = ()
) -> tuple[Moments, Array, tuple[Array, ...]]:
    """Returns the moments, the mean's offset from the shift, and the sums of what rode along in the collective."""
    centered = masked(wide - how.expand(shift), mask)
    # XLA's CPU reductions compute their input on the fly unless two of them share it: give each its own.
    again = masked(wide - how.expand(lax.optimization_barrier(shift)), mask)
    sums = how.local_sum(centered), how.local_sum(abs2(again))
    if mask is None:
        count = how.local_count(wide, mask) * how.sharing.size
        total, squares, *summed = how.sharing.sum(*sums, *riders)
    else:
        total, squares, count, *summed = how.sharing.sum(*sums, how.local_count(wide, mask), *riders)
    count += jnp.zeros_like(squares)  # of its shape, and sharded as it is on Explicit meshes
    n = jnp.maximum(count, 1)
    offset = total / n.astype(total.dtype)
    var = jnp.maximum(squares / n - abs2(offset), 0)
    return Moments(count, shift + offset, var), offset, tuple(summed)
