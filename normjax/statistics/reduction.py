"""What every statistic is made of: which elements are reduced, and how they add up to moments."""

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

from normjax._typing import Activations, Mask, promote, widen
from normjax.platforms.cpu import separate_if_narrow, separate_operands
from normjax.platforms.plain import custom_jvp, is_plain
from normjax.statistics.devices import ALONE, DeviceGroup

# The names under which `jax.checkpoint` can keep a layer's statistics, its input, and an output
# that stands for the input.
STATISTICS = "normjax_statistics"
INPUT = "normjax_input"
OUTPUT = "normjax_output"

# A variance v that is found around zero carries an error of about (v + mean^2) rounding errors.
# Up to mean^2 = 64 v that is 4e-6 of v in float32.
TOLERATED_MEAN_SQUARE = 64.0


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


class Input(NamedTuple):
    """The input of a layer as it came, and in at least float32.

    Gradients flow through `x32`, so that they are added up before they are rounded to the dtype of
    `x`. Whatever reads x and keeps it for the backward pass reads `x`, which is smaller.

    Attributes:
      x: with zeros where the mask hides a NaN or an infinity.
      x32: the same in at least float32.
      sound: where nothing was hidden; None without a mask.
    """

    x: Inexact[Array, "..."]
    x32: Inexact[Array, "..."]
    sound: Bool[Array, "..."] | None = None


@dataclass(frozen=True)
class Spec:
    """What is static about a layer's step; hashable, so that eager calls compile it once.

    Attributes:
      axes: the reduced axes, not negative.
      feature_axes: the axes of scale and bias, ascending.
      devices: the devices to share with.
      epsilon: what the layer adds to the variance.
      dtype: of y.
      groups: None, or the axis of x whose neighbours share their statistics, and how many of them
        do. x is never cut into groups: its minor axis would be as small as a group, which
        accelerators pad.
    """

    axes: tuple[int, ...]
    feature_axes: tuple[int, ...] = ()
    devices: DeviceGroup = ALONE
    epsilon: float = 0.0
    dtype: Any = None
    groups: tuple[int, int] | None = None

    def without(self, dropped: tuple[int, ...]) -> Self:
        """Returns the same of x without some axes that are not reduced."""
        groups = self.groups and (_place(self.groups[0], dropped), self.groups[1])
        axes = tuple(_place(axis, dropped) for axis in self.axes)
        return replace(self, axes=axes, groups=groups)

    def expand(self, statistic: Array) -> Array:
        """Gives a statistic the rank of x."""
        return jnp.expand_dims(statistic, self.axes)

    def count(self, x: Activations) -> Any:
        """How many elements of x each statistic is over: a float, or an array of a symbolic size."""
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
        """How many elements count on this device: real, broadcastable to the features."""
        repeats = math.prod(x.shape[axis] for axis in self.axes if mask.shape[axis] == 1)
        axes = [axis for axis in self.axes if mask.shape[axis] != 1]
        # Up to 2^24 ones add up exactly in float32. There and over examples they are summed in the
        # sums' own dtype: under jit, where that sum is one over devices, XLA sends it along with
        # the others. More are counted exactly within an example.
        ones = math.prod(map(mask.shape.__getitem__, axes))
        first = axes[:0] if isinstance(ones, int) and ones <= 2**24 else axes[1:]
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
        cut = sums.reshape(*sums.shape[:axis], -1, size, *sums.shape[axis + 1 :])
        return jnp.repeat(cut.sum(axis + 1), size, axis)


def _place(axis: int, dropped: tuple[int, ...]) -> int:
    """Where an axis is once others are dropped."""
    return axis - sum(other < axis for other in dropped)


def batch_moments(spec: Spec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments of x: one pass around zero, and a second one if the first one cancelled.

    On several devices the second pass is a collective of its own, and whether it is due is asked of
    all features at once. See `example_moments` for statistics that each example has of its own.
    """
    return moments_by(one_pass_if_safe, spec, x, mask)


def moments_by(forward: Callable[..., Moments], spec: Spec, x: Input, mask: Mask | None) -> Moments:
    """Returns the moments that `forward(spec, x, mask)` computes, with the derivative of the formula."""
    moments = _moments(forward, spec, x, mask)
    return moments._replace(count=spec.count(x.x)) if mask is None else moments


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _moments(forward: Callable[..., Moments], spec: Spec, x: Input, mask: Mask | None) -> Moments:
    return forward(spec, x.x32 if is_plain() else x.x, mask)


@_moments.defjvp
def _moments_jvp(
    forward: Callable[..., Moments], spec: Spec, primals: tuple, tangents: tuple
) -> tuple[Moments, Moments]:
    """The derivative does not know of passes and branches."""
    x, mask = primals
    moments = jax.tree.map(named, _moments(forward, spec, x, mask))
    return moments, moments_dot(spec, moments, x.x, mask, tangents[0].x32)


def moments_dot(spec: Spec, moments: Moments, x: Array, mask: Mask | None, x_dot: Array) -> Moments:
    r"""Returns the derivative of the moments of x along `x_dot`, however they were computed.

    .. math:: d\mu = \frac1n \sum_i dx_i, \qquad
              d\sigma^2 = \frac2n \sum_i \mathrm{Re}\,\overline{(x_i - \mu)}\, dx_i
    """
    (x,) = separate_if_narrow(x, 1)
    x_dot = masked(x_dot, mask)
    centered = masked(widen(x) - spec.expand(moments.mean), mask)
    n = spec.count(x) if mask is None else moments.count
    n = at_least_one(n)
    sums = spec.local_sum(x_dot), spec.local_sum(real_product(centered, x_dot))
    mean_dot, var_dot = spec.devices.sum(*sums)
    count_dot: Any = jax.tree.map(jnp.zeros_like, moments.count)
    return Moments(count_dot, _ratio(mean_dot, n), 2 * var_dot / n)


def one_pass_if_safe(spec: Spec, x: Array, mask: Mask | None) -> Moments:
    r"""Takes the moments around zero, and again around their mean if it is far from zero.

    .. math:: \mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac1n \sum_i |x_i|^2 - |\mu|^2

    The predicate is made of sums over the devices alone, so all of them take the same branch, and
    the collective within it finds its partners.
    """
    count, mean, square = means(spec, x, mask)
    if is_plain():
        count, mean, var = around(spec, x, mask, Moments(count, mean, square))
        return Moments(count, mean, jnp.maximum(var, 0))
    mean_squared = abs2(mean)
    var = square - mean_squared
    scale = TOLERATED_MEAN_SQUARE
    safe = jnp.all(mean_squared <= scale * var + scale * spec.epsilon)

    def keep(x: Array, mask: Mask | None, first: Moments) -> tuple[Array, Array]:
        return first.mean, first.var

    def second_pass(x: Array, mask: Mask | None, first: Moments) -> tuple[Array, Array]:
        return around(spec, x, mask, first)[1:]

    mean, var = lax.cond(safe, keep, second_pass, x, mask, Moments(count, mean, var))
    return Moments(count, mean, jnp.maximum(var, 0))


def around(spec: Spec, x: Array, mask: Mask | None, first: Moments) -> Moments:
    r"""Takes the moments around a mean m that a first pass found, and corrects it.

    .. math:: \delta = \frac1n \sum_i (x_i - m), \qquad \mu = m + \delta, \qquad
              \sigma^2 = \frac1n \sum_i |x_i - m|^2 - |\delta|^2

    A sum of many numbers far from zero is off by more than the last digit of their mean.
    """
    count, offset, square = means(spec, x, mask, first)
    return Moments(count, first.mean + offset, square - abs2(offset))


def means(
    spec: Spec, x: Array, mask: Mask | None, first: Moments | None = None
) -> tuple[Any, Array, Array]:
    """Returns the count (None: all), the mean, and the mean square of x in one pass.

    With the moments of a first pass they are those of x less its mean. Of an empty set they are 0.
    """
    values, squares = _values(spec, x, mask, first)
    sums = spec.local_sum(values), spec.local_sum(squares)
    count = None
    if mask is None:
        total, square = spec.devices.sum(*sums)
    elif first is None:
        total, square, count = spec.devices.sum(*sums, spec.local_count(x, mask))
    else:
        total, square = spec.devices.sum(*sums)
        count = first.count
    n = at_least_one(spec.count(x) if count is None else count)
    return count, _ratio(total, n), square / n


def _values(spec: Spec, x: Array, mask: Mask | None, first: Moments | None) -> tuple[Array, Array]:
    """Returns the terms of the sum, and their squares; 0 for what does not count."""
    own, other = separate_if_narrow(x, 2)
    if first is None:
        reference, again = None, None
    else:
        # Not to be shared either: it would be broadcast to the size of x, and written out.
        reference, again = (
            separate_operands(first.mean, 2) if other is not own else [first.mean] * 2
        )
    value = _value(spec, own, mask, reference)
    return value, abs2(value if other is own else _value(spec, other, mask, again))


def _value(spec: Spec, x: Array, mask: Mask | None, reference: Array | None) -> Array:
    x32 = widen(x)
    return masked(x32 if reference is None else x32 - spec.expand(reference), mask)


def at_least_one(count: Any) -> Any:
    """Returns a count to divide by."""
    return max(count, 1.0) if isinstance(count, float) else jnp.maximum(count, 1)


def _ratio(total: Array, n: Any) -> Array:
    return total / (n if isinstance(n, float) else n.astype(total.dtype))


def read(x: Activations, mask: Mask | None = None) -> Input:
    """Returns x under the name by which a checkpoint policy finds it, and widened.

    A NaN times a gradient of zero is NaN. So a hidden NaN must not get as far as the derivative.
    """
    sound = None
    if mask is not None:
        sound = mask | jnp.isfinite(x)
        x = jnp.where(sound, x, 0)
    x = named(x, INPUT)
    return Input(x, widen(x), sound)


def masked(x: Array, mask: Mask | None) -> Array:
    """Returns x with zeros where it does not count."""
    return x if mask is None else jnp.where(mask, x, 0)


def named(value: Array, name: str = STATISTICS) -> Array:
    """Marks what `jax.checkpoint` is to keep."""
    if is_plain():
        return value
    if jnp.iscomplexobj(value):  # which jax.checkpoint cannot keep as it is
        return lax.complex(named(value.real, name), named(value.imag, name))
    return checkpoint_name(value, name)


def abs2(x: Array) -> Array:
    """Returns |x|^2, real."""
    return real_product(x, x) if jnp.iscomplexobj(x) else x * x


def real_product(a: Array, b: Array) -> Array:
    """Re(conj(a) b), without the complex product where both are real."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def _real_dtype(x: Array) -> Any:
    return jnp.finfo(promote(x.dtype, jnp.float32)).dtype
