"""What is static about statistics: over which elements, in which unit, shared by which devices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Inexact, Real

from normjax._typing import Activations, Mask, is_weight, is_wide, promote
from normjax.platforms.plain import PLAIN
from normjax.statistics.devices import ALONE, DeviceGroup


class Moments(NamedTuple):
    """The number of elements, their mean, and their biased variance, for each feature.

    `Moments` of disjoint sets of elements combine exactly through `merge_moments`. An empty set has
    count 0; its mean and variance have no meaning and do not affect a merge.

    Attributes:
      count: number of elements, real, of shape `(*features)` or broadcastable to it.
      mean: their mean, `(*features)`; complex if x is.
      var: mean of `|x - mean|^2`, `(*features)`; real, not negative.
    """

    count: Real[ArrayLike, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Inexact[Array, "..."]
    var: Inexact[Array, "..."]


@dataclass(frozen=True)
class Spec:
    r"""The static arguments of a layer's step; hashable, so that eager calls compile it once.

    Squares of numbers far from zero are computed in a unit u of their own: they are the squares of
    :math:`u x`. u is a power of two, so nothing is rounded, and so small beside epsilon that
    squares overflow beyond :math:`10^{19} / u` only. What underflows is less than a rounding error
    of epsilon.

    Attributes:
      axes: the reduced axes, not negative.
      feature_axes: the axes of scale and bias, ascending.
      devices: the devices that share statistics.
      epsilon: added to the variance.
      dtype: dtype of y.
      scale_offset: added to the scale, if there is one.
      groups: None, or the axis of x along which groups of neighbours share statistics, and the size
        of a group. x is not reshaped into groups: its minor axis would be as small as a group,
        which accelerators pad.
    """

    axes: tuple[int, ...]
    feature_axes: tuple[int, ...] = ()
    devices: DeviceGroup = ALONE
    epsilon: float = 0.0
    dtype: Any = None
    scale_offset: float = 0.0
    groups: tuple[int, int] | None = None

    def without(self, dropped: tuple[int, ...]) -> Self:
        """Returns the spec for x without some axes that are not reduced."""
        groups = self.groups and (_place(self.groups[0], dropped), self.groups[1])
        axes = tuple(_place(axis, dropped) for axis in self.axes)
        return replace(self, axes=axes, groups=groups)

    def expand(self, statistic: Array) -> Array:
        """Gives a statistic the rank of x."""
        return jnp.expand_dims(statistic, self.axes)

    def unit(self, x: Array) -> float:
        """Returns the unit of variances: 1, so that they can be stored."""
        return 1.0

    @property
    def least_variance(self) -> float:
        """What the layer adds to the variance: errors much below it do not matter."""
        return self.epsilon

    def unit_of_squares(self, x: Array) -> float:
        """Returns u, which is 1 without an epsilon."""
        least = self.least_variance
        if least == 0 or PLAIN.value:  # whose derivatives would overflow in it
            return 1.0
        kind = jnp.finfo(x.dtype if is_wide(x) else jnp.float32)
        smallest = float(kind.tiny) * 2.0 ** (kind.nmant + 4)
        return 2.0 ** min(0, math.floor(math.log2(smallest / least) / 2))

    def deviation(self, var: Array) -> Array:
        """Returns sqrt(sigma^2 + epsilon) in x's unit, and 1 where it is 0: a constant."""
        unit = self.unit(var)
        largest = jnp.finfo(var.dtype).max  # beyond it the derivative is 0, not NaN
        total = jnp.minimum(lax.stop_gradient(var) + self.epsilon * unit**2, largest)
        if self.epsilon == 0:
            total = jnp.where(total > 0, total, 1)
        return jnp.sqrt(total) / unit

    def count(self, x: Activations) -> Any:
        """Returns how many elements of x each statistic is over, an array if sizes are symbolic."""
        count = math.prod(map(x.shape.__getitem__, self.axes))
        if self.groups is not None:
            count *= self.groups[1]
        if self.devices is not ALONE:
            count *= self.devices.size
        if isinstance(count, int):
            return float(count)
        return jnp.asarray(count).astype(_real_dtype(x))

    def local_sum(self, x: Array) -> Array:
        """Sums over this device's part of the reduced axes, and over groups."""
        total = jnp.sum(x, self.axes)
        return total if self.groups is None else self._over_groups(total, self.groups)

    def local_count(self, x: Activations, mask: Mask) -> Array:
        """Returns how many elements count on this device, broadcastable to the features."""
        repeats = math.prod(x.shape[axis] for axis in self.axes if mask.shape[axis] == 1)
        axes = [axis for axis in self.axes if mask.shape[axis] != 1]
        # Up to 2^24 ones add up exactly in float32. They are summed in the dtype of the other sums:
        # under jit, XLA then combines their collectives into one. More ones are first counted
        # exactly within an example.
        ones = math.prod(map(mask.shape.__getitem__, axes))
        few = isinstance(ones, int) and ones <= 2**24
        first = axes[:0] if few or is_weight(mask) else axes[1:]
        counts = jnp.sum(mask, first, jnp.int32, keepdims=True) if first else mask
        counts = jnp.sum(counts.astype(_real_dtype(x)), axes, keepdims=True)
        counts = (counts * repeats).squeeze(self.axes)
        if self.groups is not None and mask.shape[self.groups[0]] == 1:
            return counts * self.groups[1]
        return counts if self.groups is None else self._over_groups(counts, self.groups)

    def _over_groups(self, sums: Array, groups: tuple[int, int]) -> Array:
        """Gives each channel the sum over the channels of its group."""
        axis, size = groups
        axis = _place(axis, self.axes)
        number = sums.shape[axis] // size
        cut = sums.reshape(*sums.shape[:axis], number, size, *sums.shape[axis + 1 :])
        return jnp.repeat(cut.sum(axis + 1), size, axis)


def _place(axis: int, dropped: tuple[int, ...]) -> int:
    """Returns the index of an axis after others are removed."""
    return axis - sum(other < axis for other in dropped)


def or_one(count: Any) -> Any:
    """Returns a count that is safe to divide by: 1 where nothing counts."""
    return (count or 1.0) if isinstance(count, float) else jnp.where(count > 0, count, 1)


def _real_dtype(x: Array) -> Any:
    return jnp.finfo(promote(x.dtype, jnp.float32)).dtype
