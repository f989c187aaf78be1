"""Batch norm and an invertible activation in one step. Its backward pass needs only the output.

The derivative is written in terms of the output `z`, which the next layer stores anyway: inverting
the activation and the affine map gives the normalized input. The derivative is a forward-mode rule
that JAX transposes, so derivatives of every order work in both modes. The rule does not use x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax import _checks
from normjax._typing import Params, promote, widen
from normjax.layers.batch_step import BatchSpec
from normjax.platforms.plain import custom_jvp
from normjax.statistics.devices import pcast_like
from normjax.statistics.elements import OUTPUT, Input, named
from normjax.statistics.reduction import batch_moments, moments_dot
from normjax.statistics.spec import Moments

Name = Literal["leaky_relu", "elu", "identity"]


class Activation(NamedTuple):
    """A strictly increasing function whose derivative is a function of its value.

    Attributes:
      name: the name of the function.
      negative_slope: slope of "leaky_relu" below 0.
    """

    name: Name
    negative_slope: float

    def __call__(self, y: Array) -> Array:
        if self.name == "identity":
            return y
        if self.name == "elu":
            return jnp.where(y > 0, y, jnp.expm1(jnp.minimum(y, 0)))
        return jnp.where(y >= 0, y, self.negative_slope * y)

    def inverse(self, z: Array, dtype: Any) -> Array:
        """Inverts z, rounded to `dtype`; an ELU rounded to -1 counts as the next float above -1."""
        if self.name == "identity":
            return z
        if self.name == "elu":
            lowest = -1 + float(jnp.finfo(dtype).epsneg)
            return jnp.where(z > 0, z, jnp.log1p(jnp.clip(z, lowest, 0)))
        return jnp.where(z >= 0, z, z / self.negative_slope)

    def derivative(self, z: Array) -> Array:
        """Returns the derivative at y, given z."""
        if self.name == "identity":
            return jnp.ones_like(z)
        if self.name == "elu":
            return jnp.where(z > 0, 1, 1 + z)
        return jnp.where(z >= 0, 1, jnp.asarray(self.negative_slope, z.dtype))


def check_activation(function: str, activation: Activation, x: Array) -> None:
    """Raises an error for a function that cannot be inverted."""
    _checks.choice(function, "activation", activation.name, ("leaky_relu", "elu", "identity"))
    slope = activation.negative_slope
    if not (isinstance(slope, int | float) and 0 < slope < math.inf):
        _checks.raise_error(
            function,
            "the activation is not invertible",
            expected="negative_slope above 0, a Python number",
            got=f"negative_slope={slope!r}",
            fix="Use 0.01, or batch_norm and jax.nn.relu",
        )
    if jnp.iscomplexobj(x):
        _checks.raise_error(
            function,
            "the activation of a complex number is not defined",
            expected="a real x",
            got=f"x.dtype={x.dtype} for x.shape={x.shape}",
            fix="Use batch_norm and apply an activation of your own",
            kind=TypeError,
        )


@dataclass(frozen=True)
class ActivatedSpec(BatchSpec):
    """The static arguments of a step, including its activation."""

    activation: Activation = Activation("identity", 1.0)


def activate_by_batch(spec: ActivatedSpec, params: Params, x: Array) -> tuple[Array, Moments]:
    """Normalizes x by its own moments, applies the activation, and also returns the moments.

    The params have the rank of x.
    """
    gain, bias = _gain_and_bias(spec, params, widen(x))
    # The derivative of the moments is computed from z, so it varies over the mapped axes of z.
    (x,) = pcast_like(gain, x)
    (x,) = pcast_like(bias, x)
    x32 = widen(x)
    z, batch = _by_batch(spec, Input(lax.stop_gradient(x), x32), gain, bias)
    return z, batch._replace(count=spec.count(x))


def activate(spec: ActivatedSpec, params: Params, x: Array, mean: Array, var: Array) -> Array:
    """Normalizes x by the given statistics and applies the activation.

    Statistics and params have the rank of x.
    """
    x32 = widen(x)
    return _by_statistics(spec, x32, *_gain_and_bias(spec, params, x32), mean, widen(var))


def _gain_and_bias(spec: ActivatedSpec, params: Params, x32: Array) -> tuple[Array, Array]:
    """Returns the bias and the gain |scale| + epsilon, by which the inverse divides.

    At a scale of 0, the derivative of the gain is 1.
    """
    dtype = promote(x32.dtype, *(leaf.dtype for leaf in params.values()))
    gain, bias = jnp.ones((), dtype), jnp.zeros((), dtype)
    if "scale" in params:
        scale = params["scale"].astype(dtype)
        gain = jnp.where(scale < 0, -scale, scale) + spec.epsilon
    if "bias" in params:
        bias = params["bias"].astype(dtype)
    return gain, bias


@partial(custom_jvp, nondiff_argnums=(0,))
def _by_statistics(
    spec: ActivatedSpec, x32: Array, gain: Array, bias: Array, mean: Array, var: Array
) -> Array:
    multiplier = gain * lax.rsqrt(var + spec.epsilon).astype(gain.dtype)
    y = (x32.astype(gain.dtype) - mean.astype(gain.dtype)) * multiplier + bias
    return spec.activation(y).astype(spec.dtype)


@_by_statistics.defjvp
def _by_statistics_jvp(spec: ActivatedSpec, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    _, gain, bias, _, var = primals
    z = named(_by_statistics(spec, *primals), OUTPUT)
    return z, _dot(spec, z, gain, bias, var, tangents)


@partial(custom_jvp, nondiff_argnums=(0,))
def _by_batch(spec: ActivatedSpec, x: Input, gain: Array, bias: Array) -> tuple[Array, Moments]:
    batch = batch_moments(spec, x, None)._replace(count=None)
    mean, var = spec.expand(batch.mean), spec.expand(batch.var)
    return _by_statistics(spec, x.x32, gain, bias, mean, var), batch


@_by_batch.defjvp
def _by_batch_jvp(
    spec: ActivatedSpec, primals: tuple, tangents: tuple
) -> tuple[tuple[Array, Moments], tuple[Array, Moments]]:
    _, gain, bias = primals
    z, batch = _by_batch(spec, *primals)
    z, batch = named(z, OUTPUT), jax.tree.map(named, batch)
    x_dot, gain_dot, bias_dot = tangents
    return (z, batch), _by_batch_dot(spec, z, batch, gain, bias, (x_dot.x32, gain_dot, bias_dot))


def _by_batch_dot(
    spec: ActivatedSpec, z: Array, batch: Moments, gain: Array, bias: Array, dots: tuple
) -> tuple[Array, Moments]:
    """Returns the derivatives of z and of the moments. x - mean is recovered from z."""
    x_dot, gain_dot, bias_dot = dots
    var = spec.expand(batch.var)
    centered = _normalized(spec, z, gain, bias) * jnp.sqrt(var + spec.epsilon)
    around_zero = batch._replace(mean=jnp.zeros_like(batch.mean))
    batch_dot = moments_dot(spec, around_zero, centered, None, x_dot)
    moved = x_dot, gain_dot, bias_dot, spec.expand(batch_dot.mean), spec.expand(batch_dot.var)
    return _dot(spec, z, gain, bias, var, moved), batch_dot


def _normalized(spec: ActivatedSpec, z: Array, gain: Array, bias: Array) -> Array:
    """Returns (x - mean) / sqrt(var + epsilon), from z."""
    return (spec.activation.inverse(z.astype(gain.dtype), z.dtype) - bias) / gain


def _dot(spec: ActivatedSpec, z: Array, gain: Array, bias: Array, var: Array, dots: tuple) -> Array:
    """Returns the derivative of z along `dots`, the tangents of x, gain, bias, mean and var.

    Its transpose has two reductions.
    """
    x_dot, gain_dot, bias_dot, mean_dot, var_dot = (dot.astype(gain.dtype) for dot in dots)
    inverse = lax.rsqrt(var + spec.epsilon).astype(gain.dtype)
    slope = gain_dot - gain * (inverse * (inverse * var_dot)) / 2
    offset = bias_dot - gain * inverse * mean_dot
    slope, offset = pcast_like(z, slope, offset)
    (multiplier,) = pcast_like(z, gain * inverse)  # cast by itself, since it is not a tangent
    y_dot = _normalized(spec, z, gain, bias) * slope + offset + x_dot * multiplier
    return (spec.activation.derivative(z.astype(gain.dtype)) * y_dot).astype(z.dtype)
