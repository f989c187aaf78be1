"""What every statistic is made of: which elements are reduced, how many count, and what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Inexact, Real

from normjax._typing import Activations, Mask, promote
from normjax.statistics.sharing import ALONE, Sharing

# The names under which a layer's statistics, its input, and an output that stands for it, can be
# kept for the backward pass.
STATISTICS = "normjax_statistics"
INPUT = "normjax_input"
OUTPUT = "normjax_output"


class Moments(NamedTuple):
    """How many elements, their mean, and their biased variance, for each feature.

    `Moments` of disjoint sets of elements combine exactly through `merge_moments`. An empty set has
    count 0; its mean and variance carry no meaning and count for nothing in a merge.

    Attributes:
      count: number of elements, real, of shape `(*features)` or broadcastable to it.
      mean: their mean, `(*features)`; complex where x is.
      var: mean of `|x - mean|^2`, `(*features)`; real, not negative.
    """

    count: Real[ArrayLike, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Inexact[Array, "..."]
    var: Inexact[Array, "..."]


class Reduction(NamedTuple):
    """The static part of a reduction.

    Attributes:
      axes: the reduced axes, not negative.
      sharing: the devices to share with.
      epsilon: what the caller adds to the variance.
      groups: None, or the axis of x whose neighbours share their statistics, and how many of them
        do. x is never cut
        into groups: its minor axis would be as small as a group, which accelerators pad.
    """

    axes: tuple[int, ...]
    sharing: Sharing = ALONE
    epsilon: float = 0.0
    groups: tuple[int, int] | None = None

    def without(self, axes: tuple[int, ...]) -> Reduction:
        """Returns the same of x without some axes that are not reduced."""
        groups = self.groups and (_place(self.groups[0], axes), self.groups[1])
        return self._replace(axes=tuple(_place(axis, axes) for axis in self.axes), groups=groups)

    def expand(self, statistic: Array) -> Array:
        """Gives a statistic the rank of x."""
        return jnp.expand_dims(statistic, self.axes)

    def local_sum(self, x: Array) -> Array:
        """Sums over this device's part of the reduced axes, and over groups."""
        return self._over_groups(jnp.sum(x, self.axes))

    def local_count(self, x: Activations, mask: Mask | None) -> Array:
        """How many elements count on this device: real, broadcastable to the features."""
        dtype = jnp.finfo(promote(x.dtype, jnp.float32)).dtype
        if mask is None:
            members = 1 if self.groups is None else self.groups[1]
            return jnp.asarray(math.prod(x.shape[axis] for axis in self.axes) * members, dtype)
        repeats = math.prod(x.shape[axis] for axis in self.axes if mask.shape[axis] == 1)
        cut = [axis for axis in self.axes if mask.shape[axis] != 1]
        # Exact within an example; over examples in the sums' own dtype, so that under jit, where
        # that sum is one over devices, XLA sends it along with the others.
        seen = jnp.sum(mask, cut[1:], jnp.int32, keepdims=True).astype(dtype)
        counts = (jnp.sum(seen, cut[:1], keepdims=True) * repeats).squeeze(self.axes)
        if self.groups is not None and mask.shape[self.groups[0]] == 1:
            return counts * self.groups[1]
        return self._over_groups(counts)

    def _over_groups(self, sums: Array) -> Array:
        """Gives each channel the sum over the channels of its group."""
        if self.groups is None:
            return sums
        axis, size = self.groups
        axis = _place(axis, self.axes)
        groups = sums.reshape(*sums.shape[:axis], -1, size, *sums.shape[axis + 1 :]).sum(axis + 1)
        return jnp.repeat(groups, size, axis)

    def moments_dot(self, moments: Moments, x: Array, mask: Mask | None, dx: Array) -> Moments:
        r"""Returns the derivative of the moments of x along dx, however they were computed.

        .. math:: d\mu = \frac1n \sum_i dx_i, \qquad
                  d\sigma^2 = \frac2n \sum_i \mathrm{Re}\,\overline{(x_i - \mu)}\, dx_i
        """
        dx = masked(dx, mask)
        centered = masked(widen(x) - self.expand(moments.mean), mask)
        n = jnp.maximum(moments.count, 1)
        mean_dot, var_dot = self.sharing.sum(
            self.local_sum(dx), self.local_sum(real_product(centered, dx))
        )
        return Moments(
            jnp.zeros_like(moments.count), mean_dot / n.astype(mean_dot.dtype), 2 * var_dot / n
        )


def _place(axis: int, dropped: tuple[int, ...]) -> int:
    """Where an axis is once others are dropped."""
    return axis - sum(other < axis for other in dropped)


def widen(x: Activations) -> Activations:
    """Casts to the precision that statistics are computed in: at least float32."""
    return x.astype(promote(x.dtype, jnp.float32))


def apart(*arrays: Array) -> tuple[Array, ...]:
    """Returns arrays as they are; on CPUs the compiler takes them for others.

    XLA's reductions on CPUs cast, subtract and multiply on the fly (and read bfloat16 as it is),
    but not where the
    result has another user: then it is written out first. Reductions of copies have their operands
      to themselves.
    """
    return _on_cpus(lax.optimization_barrier, *arrays)


def apart_if_narrow(x: Array) -> Array:
    """Returns x; apart, where a reduction casts it."""
    return x if widen(x).dtype == x.dtype else apart(x)[0]


def written_out(*arrays: Array) -> tuple[Array, ...]:
    """Returns small arrays as they are; on CPUs they are stored before x meets them, and so are their gradients.

    Else XLA computes them again for each element of x, or makes one slow fusion of the reductions
    of x and their uses. Rounding to the precision that they have is what it does not fuse.
    """

    def rounded(array: Array) -> Array:
        if jnp.iscomplexobj(array):
            return array
        kind = jnp.finfo(array.dtype)
        return lax.reduce_precision(array, kind.nexp, kind.nmant)

    return _on_cpus(rounded, *arrays)


def _on_cpus(change: Callable[[Array], Array], *arrays: Array) -> tuple[Array, ...]:
    """Changes each array where the program is compiled for CPUs, and there alone."""
    return lax.platform_dependent(
        *arrays, cpu=lambda *arrays: tuple(map(change, arrays)), default=lambda *arrays: arrays
    )


def masked(x: Array, mask: Mask | None) -> Array:
    """Returns x with zeros where it does not count."""
    return x if mask is None else jnp.where(mask, x, 0)


def named(value: Array, name: str = STATISTICS) -> Array:
    """Marks what `jax.checkpoint` is to keep."""
    if jnp.iscomplexobj(value):  # which jax.checkpoint cannot keep as it is
        return lax.complex(named(value.real, name), named(value.imag, name))
    return checkpoint_name(value, name)


def abs2(x: Array) -> Array:
    """Returns |x|^2, real."""
    return real_product(x, x)


def real_product(a: Array, b: Array) -> Array:
    """Re(conj(a) b), without the complex product where both are real."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b
