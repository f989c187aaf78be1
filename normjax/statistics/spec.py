"""The static description of statistics: reduction axes, unit and devices."""

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

    `merge_moments` combines the `Moments` of disjoint sets exactly. An empty set has count 0; its
    mean and variance are arbitrary and do not affect a merge.

    Attributes:
      count: number of elements, real, of shape `(*features)` or broadcastable to it.
      mean: mean of the elements, `(*features)`; complex if x is complex.
      var: mean of `|x - mean|^2`, `(*features)`; real, not negative.
    """

    count: Real[ArrayLike, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Inexact[Array, "..."]
    var: Inexact[Array, "..."]


@dataclass(frozen=True)
class Spec:
    r"""The static arguments of a layer's step; hashable, so that eager calls compile it once.

    Squares of numbers far from zero are scaled by a unit u: they are squares of :math:`u x`. u is a
    power of two, so scaling does not round, and u is so small that squares overflow only beyond
    :math:`10^{19} / u`. Squares that underflow are smaller than a rounding error of epsilon.

    Attributes:
      axes: the reduction axes, non-negative.
      feature_axes: the axes of scale and bias, ascending.
      devices: the devices that share statistics.
      epsilon: added to the variance.
      dtype: dtype of y.
      scale_offset: added to the scale, if there is a scale.
      groups: None, or the axis of x along which groups of neighbours share statistics, and the size
        of a group. x is not reshaped into groups, since accelerators would pad a minor axis as
        small as a group.
    """

    axes: tuple[int, ...]
    feature_axes: tuple[int, ...] = ()
    devices: DeviceGroup = ALONE
    epsilon: float = 0.0
    dtype: Any = None
    scale_offset: float = 0.0
    groups: tuple[int, int] | None = None

    def without(self, dropped: tuple[int, ...]) -> Self:
        """Returns the spec for x after some axes that are not reduced were removed."""
        groups = self.groups and (_place(self.groups[0], dropped), self.groups[1])
        axes = tuple(_place(axis, dropped) for axis in self.axes)
        return replace(self, axes=axes, groups=groups)

    def expand(self, statistic: Array) -> Array:
        """Expands a statistic to the rank of x."""
        return jnp.expand_dims(statistic, self.axes)

    def unit(self, x: Array) -> float:
        """Returns the unit of variances: 1, so that they can be stored."""
        return 1.0

    @property
    def least_variance(self) -> float:
        """Returns what the layer adds to the variance; much smaller errors are negligible."""
        return self.epsilon

    def unit_of_squares(self, x: Array) -> float:
        """Returns u, which is 1 if epsilon is 0."""
        least = self.least_variance
        if least == 0 or PLAIN.value:  # derivatives of the plain formula would overflow with u
            return 1.0
        kind = jnp.finfo(x.dtype if is_wide(x) else jnp.float32)
        smallest = float(kind.tiny) * 2.0 ** (kind.nmant + 4)
        return 2.0 ** min(0, math.floor(math.log2(smallest / least) / 2))

    def deviation(self, var: Array) -> Array:
        """Returns sqrt(sigma^2 + epsilon) in the unit of x, as a constant; 1 instead of 0."""
        unit = self.unit(var)
        largest = jnp.finfo(var.dtype).max  # makes the derivative 0, not NaN
        total = jnp.minimum(lax.stop_gradient(var) + self.epsilon * unit**2, largest)
        if self.epsilon == 0:
            total = jnp.where(total > 0, total, 1)
        return jnp.sqrt(total) / unit

    def count(self, x: Activations) -> Any:
        """Returns the number of elements of x in each statistic; an array if sizes are symbolic."""
        count = math.prod(map(x.shape.__getitem__, self.axes))
        if self.groups is not None:
            count *= self.groups[1]
        if self.devices is not ALONE:
            count *= self.devices.size
        if isinstance(count, int):
            return float(count)
        return jnp.asarray(count).astype(_real_dtype(x))

    def local_sum(self, x: Array) -> Array:
        """Sums over this device's part of the reduction axes, and over groups."""
        total = jnp.sum(x, self.axes)
        return total if self.groups is None else self._over_groups(total, self.groups)

    def local_count(self, x: Activations, mask: Mask) -> Array:
        """Returns how many elements count on this device, broadcastable to the features."""
        repeats = math.prod(x.shape[axis] for axis in self.axes if mask.shape[axis] == 1)
        axes = [axis for axis in self.axes if mask.shape[axis] != 1]
        # Up to 2^24 ones are summed exactly in float32. The count has the dtype of the other sums,
        # so that XLA combines their collectives under jit. Beyond 2^24, ones are first counted
        # exactly within each example.
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
        """Returns, for each channel, the sum over the channels of its group."""
        axis, size = groups
        axis = _place(axis, self.axes)
        number = sums.shape[axis] // size
        cut = sums.reshape(*sums.shape[:axis], number, size, *sums.shape[axis + 1 :])
        return jnp.repeat(cut.sum(axis + 1), size, axis)


def _place(axis: int, dropped: tuple[int, ...]) -> int:
    """Returns the index of an axis after other axes are removed."""
    return axis - sum(other < axis for other in dropped)


def or_one(count: Any) -> Any:
    """Returns a count that is safe to divide by: 1 where nothing counts."""
    return (count or 1.0) if isinstance(count, float) else jnp.where(count > 0, count, 1)


def _real_dtype(x: Array) -> Any:
    return jnp.finfo(promote(x.dtype, jnp.float32)).dtype
