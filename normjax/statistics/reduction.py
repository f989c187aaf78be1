"""Reduces arrays to moments: the basis of every statistic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Inexact, Real

from normjax._typing import Activations, Mask, is_weight, is_wide, promote, widen
from normjax.platforms.cpu import separate_if_narrow, separate_operands
from normjax.platforms.plain import custom_jvp, is_plain
from normjax.statistics.devices import ALONE, DeviceGroup

# The names under which `jax.checkpoint` can store a layer's statistics, its input, and an output
# that replaces the input.
STATISTICS = "normjax_statistics"
INPUT = "normjax_input"
OUTPUT = "normjax_output"

# A variance v that is computed around zero has an error of about (v + mean^2) rounding errors.
# Up to mean^2 = 64 v, over a hundred thousand elements, 2e-5 of v was measured in float32.
TOLERATED_MEAN_SQUARE = 64.0


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


class Input(NamedTuple):
    """The input of a layer, in its own dtype and in at least float32.

    Gradients flow through `x32`, so that they are summed before they are rounded to the dtype of
    `x`. Reductions read and store `x`, which is smaller.

    Attributes:
      x: the input, with zeros where the mask hides a NaN or an infinity.
      x32: the same in at least float32.
      sound: False where the mask hid a NaN or an infinity; None without a mask.
    """

    x: Inexact[Array, "..."]
    x32: Inexact[Array, "..."]
    sound: Bool[Array, "..."] | None = None


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
      groups: None, or the axis of x along which groups of neighbours share statistics, and the size
        of a group. x is not reshaped into groups: its minor axis would be as small as a group,
        which accelerators pad.
    """

    axes: tuple[int, ...]
    feature_axes: tuple[int, ...] = ()
    devices: DeviceGroup = ALONE
    epsilon: float = 0.0
    dtype: Any = None
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
        if self.least_variance == 0:
            return 1.0
        smallest = float(jnp.finfo(x.dtype if is_wide(x) else jnp.float32).tiny)
        return 2.0 ** min(0, math.floor(math.log2(smallest * 2**27 / self.least_variance) / 2))

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
    if mask is not None and is_weight(mask):
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
    deviation = spec.deviation(moments.var)
    # In deviations, and without them in the end, so that no cube of one is formed: see `normalize`.
    inverse = spec.expand((1 / deviation).astype(moments.mean.dtype))
    normalized = (widen(x) - spec.expand(moments.mean)) * inverse
    product = real_product(masked(normalized, mask), x_dot)
    mean_dot, total = spec.devices.sum(spec.local_sum(x_dot), spec.local_sum(product))
    count_dot: Any = jax.tree.map(jnp.zeros_like, moments.count)
    var_dot = times(deviation, 2 * spec.unit(x) ** 2) * total / n
    return Moments(count_dot, _ratio(mean_dot, n), var_dot)


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
    return Moments(count_dot, _ratio(mean_dot, n), var_dot / n)


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
    unit = spec.unit_of_squares(x)
    count, offset, square = means(spec, x, mask, first, unit)
    var = square - abs2(times(offset, unit))
    return Moments(count, first.mean + offset, times(var, (spec.unit(x) / unit) ** 2))


def means(
    spec: Spec, x: Array, mask: Mask | None, first: Moments | None = None, unit: float = 1.0
) -> tuple[Any, Array, Array]:
    """Returns the count (None: all), the mean, and the mean square of x in one pass.

    Given the moments of a first pass, x is centered around their mean. For an empty set they are 0.
    """
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
    return count, _ratio(total, n), square / n


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


def times(x: Array, factor: float) -> Array:
    """Returns x times a constant, which is often 1."""
    return x if factor == 1 else x * factor


def or_one(count: Any) -> Any:
    """Returns a count that is safe to divide by: 1 where nothing counts."""
    return (count or 1.0) if isinstance(count, float) else jnp.where(count > 0, count, 1)


def _ratio(total: Array, n: Any) -> Array:
    return total / (n if isinstance(n, float) else n.astype(total.dtype))


def read(x: Activations, mask: Mask | None = None) -> Input:
    """Returns x, named for checkpoint policies, and widened.

    A NaN times a gradient of zero is NaN. So a masked NaN must not reach the derivative.
    """
    sound = None
    if mask is not None:
        sound = counts(mask) | jnp.isfinite(x)
        x = jnp.where(sound, x, 0)
    x = named(x, INPUT)
    return Input(x, widen(x), sound)


def masked(x: Array, mask: Mask | None) -> Array:
    """Returns x with zeros where it does not count."""
    return x if mask is None else jnp.where(counts(mask), x, 0)


def weighted(x: Array, mask: Mask | None) -> Array:
    """Returns x times the weights, where the mask is one of weights."""
    return x * mask.astype(x.dtype) if mask is not None and is_weight(mask) else x


def counts(mask: Mask) -> Array:
    """Where elements count: a bool."""
    return mask > 0 if is_weight(mask) else mask


def named(value: Array, name: str = STATISTICS) -> Array:
    """Marks an array that `jax.checkpoint` should store."""
    if is_plain():
        return value
    if jnp.iscomplexobj(value):  # jax.checkpoint cannot store complex arrays by name
        return lax.complex(named(value.real, name), named(value.imag, name))
    return checkpoint_name(value, name)


def abs2(x: Array) -> Array:
    """Returns |x|^2, real."""
    return real_product(x, x) if jnp.iscomplexobj(x) else x * x


def real_product(a: Array, b: Array) -> Array:
    """Returns Re(conj(a) b), without a complex product if both are real."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def _real_dtype(x: Array) -> Any:
    return jnp.finfo(promote(x.dtype, jnp.float32)).dtype
