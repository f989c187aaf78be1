"""Standardizes each example: the arithmetic of layer, group and instance norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from normjax._typing import Params
from normjax.layers.affine import lay_out, normalize
from normjax.layers.by_example import has_one_derivative, normalize_by_own
from normjax.layers.jit_step import jit_step, jit_step_within_examples
from normjax.statistics.cumulative import cumulative_moments
from normjax.statistics.elements import named, read
from normjax.statistics.per_example import ExampleSpec, example_moments

EpsilonTo = Literal["variance", "deviation"]


@dataclass(frozen=True)
class StandardizeSpec(ExampleSpec):
    """The static arguments of a step.

    Attributes:
      gain: a constant factor of the scale.
      epsilon_to: "variance" or "deviation", to which epsilon is added.
    """

    gain: float = 1.0
    epsilon_to: EpsilonTo = "variance"

    @property
    def least_variance(self) -> float:
        """Returns a lower bound of what is added to the variance."""
        return self.epsilon if self.epsilon_to == "variance" else self.epsilon**2


class KernelSpec(StandardizeSpec):
    """The static arguments of a step on a kernel.

    A network has many small kernels. Tracing a program for each platform and compiling a branch
    would take longer than reading the kernels twice.
    """

    @property
    def in_two_passes(self) -> bool:
        """Returns True: kernels always take two passes."""
        return True


@dataclass(frozen=True)
class CumulativeSpec(StandardizeSpec):
    """The static arguments of a step whose statistics are cumulative along an axis.

    Attributes:
      cumulative_axis: the cumulative axis, which is not in `axes`.
    """

    cumulative_axis: int = 0


@jit_step
def standardize_cumulatively(
    params: Params, x: Array, mask: Array | None, spec: CumulativeSpec
) -> Array:
    """Normalizes x by its moments up to each position.

    Before the first element that counts, the mean is 0 and the variance is 1.
    """
    shape = x.shape
    params = lay_out(params, x.ndim, spec)
    params, x, mask, spec = _into_groups(params, x, mask, spec)
    inputs, unit = read(x, mask), spec.unit(x)
    count, mean, var = cumulative_moments(spec, spec.cumulative_axis, inputs, mask)
    if mask is not None:
        var = jnp.where(jnp.asarray(count) > 0, var, unit**2)
    y = normalize(inputs, named(mean), named(var), params, spec.epsilon, unit)
    return y.reshape(shape).astype(spec.dtype)


def _into_groups(
    params: Params, x: Array, mask: Array | None, spec: CumulativeSpec
) -> tuple[Params, Array, Array | None, CumulativeSpec]:
    """Splits the channel axis into groups and members; the members are a new, reduced axis.

    Otherwise the statistics of each position would be as large as x.
    """
    assert spec.groups is not None
    channel, size = spec.groups
    if x.shape[channel] == size:  # one group: avoids an axis of size 1, which is slow on CPUs
        axes = tuple(sorted((*spec.axes, channel)))
        return params, x, mask, replace(spec, axes=axes, groups=None)

    def cut(part: Array) -> Array:
        groups = (1, 1) if part.shape[channel] == 1 else (part.shape[channel] // size, size)
        return part.reshape(*part.shape[:channel], *groups, *part.shape[channel + 1 :])

    def moved(axis: int) -> int:
        return axis + (axis > channel)

    params, x, mask = jax.tree.map(cut, (params, x, mask))
    axes = tuple(sorted((*map(moved, spec.axes), channel + 1)))
    along = moved(spec.cumulative_axis)
    return params, x, mask, replace(spec, axes=axes, groups=None, cumulative_axis=along)


@jit_step_within_examples
def standardize(params: Params, x: Array, mask: Array | None, spec: StandardizeSpec) -> Array:
    """Normalizes x by its own moments. If no element counts, the mean is 0 and the variance 1."""
    inputs = read(x, mask)
    params = _with_gain(params, spec)
    if spec.epsilon_to == "variance" and has_one_derivative(spec, mask):
        return normalize_by_own(spec, inputs, params).astype(spec.dtype)
    count, mean, var = example_moments(spec, inputs, mask)
    if mask is not None:
        var = jnp.where(jnp.asarray(count) > 0, var, spec.unit(x) ** 2)
    epsilon, unit = spec.epsilon, spec.unit(x)
    if spec.epsilon_to == "deviation":
        var, epsilon = (_root(var) + epsilon * unit) ** 2, 0.0
    y = normalize(inputs, spec.expand(mean), spec.expand(var), params, epsilon, unit)
    return y.astype(spec.dtype)


def _with_gain(params: Params, spec: StandardizeSpec) -> Params:
    """Returns the params with the scale multiplied by the gain."""
    if spec.gain == 1:
        return params
    scale = params["scale"] if "scale" in params else jnp.ones(())
    return params | {"scale": scale * spec.gain}


def _root(var: Array) -> Array:
    """Returns the square root; near 0, its infinite derivative is replaced by 0."""
    return jnp.sqrt(jnp.maximum(var, jnp.finfo(var.dtype).tiny))
