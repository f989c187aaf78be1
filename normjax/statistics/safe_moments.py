"""Mean and variance in one pass over `x`, one collective, and float32: the arithmetic of statistics over a batch.

The variance is taken around a shift `s`, a guess at the mean:

    d = sum(x - s) / n,    mean = s + d,    var = sum(|x - s|^2) / n - |d|^2

which is exact for any s, and loses no digits while |d|^2 is not much larger than var. See
docs/pages/design.md for what else was tried, and measured.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from normjax._typing import Activations, Mask
from normjax.statistics.reduction import (
    Moments,
    Reduction,
    abs2,
    apart_if_narrow,
    masked,
    named,
    widen,
)
from normjax.statistics.sharing import ALONE, Sharing, all_equal, fingerprint

# A variance v found by way of an offset d from the shift carries an error of about (v + d^2)
# rounding errors. Up to d^2 = 64 v that is 4e-6 of v in float32, inside the 1e-5 that the library
# promises.
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

    Both are taken because of what XLA does with them: gradients flow through `wide`, so that they
    are added up before they are rounded to the dtype of `x`; reductions read `x`, each with a cast
    of its own, and so does the branch of the second pass, since an operand of a branch is written
    out in the dtype that it has.

    Args:
      x: the input as it came.
      wide: `widen(x)`.
      axes: non-negative reduction axes.
      shift: a guess at the mean that does not depend on `x` (so that XLA can fuse the statistics
        into whatever computes `x`), of the features' shape. The result does not depend on it, the
        cost does. None: zero.
      mask: None, or bool with the rank of `x`.
      sharing: the devices to share with.
      epsilon: what the caller adds to the variance: errors far below it do not call for a second
        pass.
    """
    how = Reduction(axes, sharing, epsilon)
    features = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    if shift is None:
        shift = jnp.zeros(features, wide.dtype)
    shift = jnp.broadcast_to(lax.stop_gradient(shift).astype(wide.dtype), features)
    # XLA's reductions on CPUs are fastest over x as it is.
    shift = lax.platform_dependent(shift, cpu=jnp.zeros_like, default=lambda shift: shift)
    return _compiled(how, wide, x, mask, shift)


def guarded_moments(how: Reduction, x: Array, mask: Array | None, shift: Array) -> Moments:
    """One pass around `shift`; and where it cancelled, a second one, around the mean that the first one found."""
    known_equal = how.sharing.knows_equal(shift)
    riders = (
        ()
        if known_equal
        else (how.local_count(x, mask).astype(shift.dtype) * shift, fingerprint(shift))
    )
    first, summed = shifted_sums(how, x, mask, shift, riders=riders)
    _, mean, var = first.moments()
    unsafe = jnp.any(~(abs2(first.offset) <= TOLERATED_OFFSET * (var + how.epsilon)))
    if not known_equal:
        # Devices that came with different shifts (replicas that trained apart) agree on the mean,
        # not on the variance.
        agreed = all_equal(summed[1], how.sharing.size)
        mean = jnp.where(
            agreed, mean, summed[0] / jnp.maximum(first.n, 1).astype(mean.dtype) + first.offset
        )
        unsafe |= ~agreed

    def second_pass(x: Array, mask: Array | None, mean: Array, _: Array) -> tuple[Array, Array]:
        return shifted_sums(how, x, mask, mean)[0].moments()[1:]

    # The predicate is made of sums over the devices alone, so all of them take the same branch,
    # and the collective within it finds its partners.
    mean, var = lax.cond(unsafe, second_pass, lambda x, mask, *first: first, x, mask, mean, var)
    return Moments(first.n, mean, var)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _safe_moments(
    how: Reduction, wide: Array, x: Array, mask: Array | None, shift: Array
) -> Moments:
    return guarded_moments(how, x, mask, shift)


@_safe_moments.defjvp
def _safe_moments_jvp(how: Reduction, primals: tuple, tangents: tuple) -> tuple[Moments, Moments]:
    """The derivative knows nothing of shifts and branches."""
    _, x, mask, _ = primals
    result = jax.tree.map(named, _safe_moments(how, *primals))
    return result, how.moments_dot(result, apart_if_narrow(x), mask, tangents[0])


# Compiled so that eager calls, too, trace and compile the branch once.
_compiled = jax.jit(_safe_moments, static_argnums=0, inline=True)


class Sums(NamedTuple):
    """What a pass over x adds up, of the features' shape.

    Attributes:
      n: how many elements.
      shift: what they are counted from.
      total: the sum of `x - shift`.
      squares: that of `|x - shift|^2`.
    """

    n: Array
    shift: Array
    total: Array
    squares: Array

    @property
    def offset(self) -> Array:
        """Of the mean from the shift."""
        return self.total / jnp.maximum(self.n, 1).astype(self.total.dtype)

    def moments(self) -> Moments:
        """Returns what follows; of an empty set, the shift and 0."""
        var = jnp.maximum(self.squares / jnp.maximum(self.n, 1) - abs2(self.offset), 0)
        return Moments(self.n, self.shift + self.offset, var)


def shifted_sums(
    how: Reduction,
    x: Array,
    mask: Array | None,
    shift: Array,
    *,
    again: Array | None = None,
    riders: tuple[Array, ...] = (),
) -> tuple[Sums, tuple[Array, ...]]:
    """Returns the sums around a shift, and those of what rode along in the collective.

    `again` is the shift once more, for the squares: x less the same shift would be one array, which
    XLA's CPU reductions would have written out. Without it they share, which costs nothing where
    the shift is a constant zero.
    """
    again = shift if again is None else again
    first = apart_if_narrow(x)
    total = how.local_sum(masked(widen(first) - how.expand(shift), mask))
    squares = how.local_sum(abs2(masked(widen(apart_if_narrow(first)) - how.expand(again), mask)))
    if mask is None:
        count = how.local_count(x, mask) * how.sharing.size
        total, squares, *summed = how.sharing.sum(total, squares, *riders)
    else:
        total, squares, count, *summed = how.sharing.sum(
            total, squares, how.local_count(x, mask), *riders
        )
    count += jnp.zeros_like(squares)  # of its shape, and sharded as it is on Explicit meshes
    return Sums(count, shift, total, squares), tuple(summed)
