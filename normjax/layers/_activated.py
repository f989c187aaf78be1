"""Batch norm and an invertible activation in one step: of x's size, the backward pass needs the output alone.

The derivative is written in terms of the output `z`, which the next layer keeps anyway: inverting
activation and affine map gives back the normalized input. Like that of the moments it is a rule for
the forward mode, which JAX transposes; so every order and both modes work, and x is not among what
the rule uses.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax import _checks
from normjax._typing import Params, promote
from normjax.statistics.reduction import OUTPUT, Moments, Reduction, named, widen
from normjax.statistics.safe_moments import safe_moments
from normjax.statistics.sharing import vary_like

Name = Literal["leaky_relu", "elu", "identity"]


class Activation(NamedTuple):
    """A strictly increasing function whose derivative can be read off its value.

    Attributes:
      name: which.
      negative_slope: of "leaky_relu".
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
        """Returns y of a z that was rounded to `dtype`; for an ELU rounded to -1, that of the value next to it."""
        if self.name == "identity":
            return z
        if self.name == "elu":
            lowest = -1 + float(jnp.finfo(dtype).epsneg)
            return jnp.where(z > 0, z, jnp.log1p(jnp.clip(z, lowest, 0)))
        return jnp.where(z >= 0, z, z / self.negative_slope)

    def derivative(self, z: Array) -> Array:
        """Returns that at y, given z."""
        if self.name == "identity":
            return jnp.ones_like(z)
        if self.name == "elu":
            return jnp.where(z > 0, 1, 1 + z)
        return jnp.where(z >= 0, 1, jnp.asarray(self.negative_slope, z.dtype))


def check_activation(function: str, activation: Activation, x: Array) -> None:
    """Refuses what cannot be inverted."""
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
            fix="Use batch_norm, and an activation of your own",
            kind=TypeError,
        )


class How(NamedTuple):
    """The static part of a step: the reduction, the activation, and the dtype of the output."""

    reduction: Reduction
    activation: Activation
    dtype: Any


def activate_by_batch(
    how: How, params: Params, x: Array, shift: Array | None
) -> tuple[Array, Moments]:
    """Normalizes x by its own moments and activates it; returns the moments, too. Params have the rank of x."""
    wide = widen(x)
    return _by_batch(how, wide, lax.stop_gradient(x), shift, *_gain_and_bias(how, params, wide))


def activate(how: How, params: Params, x: Array, mean: Array, var: Array) -> Array:
    """Normalizes x by statistics that are given and activates it. They and params have the rank of x."""
    wide = widen(x)
    return _by_population(how, wide, *_gain_and_bias(how, params, wide), mean, var)


def _gain_and_bias(how: How, params: Params, x: Array) -> tuple[Array, Array]:
    """The gain is |scale| + epsilon: to invert the affine map divides by it. At scale 0 its derivative is 1."""
    dtype = promote(x.dtype, *(leaf.dtype for leaf in params.values()))
    gain, bias = jnp.ones((), dtype), jnp.zeros((), dtype)
    if "scale" in params:
        scale = params["scale"].astype(dtype)
        gain = jnp.where(scale < 0, -scale, scale) + how.reduction.epsilon
    if "bias" in params:
        bias = params["bias"].astype(dtype)
    return gain, bias


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_population(how: How, x: Array, gain: Array, bias: Array, mean: Array, var: Array) -> Array:
    multiplier = gain * lax.rsqrt(var + how.reduction.epsilon).astype(gain.dtype)
    y = (x.astype(gain.dtype) - mean.astype(gain.dtype)) * multiplier + bias
    return how.activation(y).astype(how.dtype)


@_by_population.defjvp
def _by_population_jvp(how: How, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, gain, bias, mean, var = primals
    z = named(_by_population(how, *primals), OUTPUT)
    return z, _dot(how, z, (gain, bias, var), tangents)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_batch(
    how: How, wide: Array, x: Array, shift: Array | None, gain: Array, bias: Array
) -> tuple[Array, Moments]:
    axes, sharing, epsilon, _ = how.reduction
    seen = safe_moments(x, wide, axes, shift=shift, sharing=sharing, epsilon=epsilon)
    mean, var = how.reduction.expand(seen.mean), how.reduction.expand(seen.var)
    return _by_population(how, wide, gain, bias, mean, var), seen


@_by_batch.defjvp
def _by_batch_jvp(
    how: How, primals: tuple, tangents: tuple
) -> tuple[tuple[Array, Moments], tuple[Array, Moments]]:
    *_, gain, bias = primals
    x_dot, _, _, gain_dot, bias_dot = tangents
    z, seen = _by_batch(how, *primals)
    z, seen = named(z, OUTPUT), jax.tree.map(named, seen)
    expand = how.reduction.expand
    var = expand(seen.var)
    centered = _normalized(how, z, gain, bias) * jnp.sqrt(var + how.reduction.epsilon)
    around_zero = seen._replace(mean=jnp.zeros_like(seen.mean))
    seen_dot = how.reduction.moments_dot(around_zero, centered, None, x_dot)
    moved = x_dot, gain_dot, bias_dot, expand(seen_dot.mean), expand(seen_dot.var)
    return (z, seen), (_dot(how, z, (gain, bias, var), moved), seen_dot)


def _normalized(how: How, z: Array, gain: Array, bias: Array) -> Array:
    """Returns (x - mean) / sqrt(var + epsilon), from z."""
    return (how.activation.inverse(z.astype(gain.dtype), z.dtype) - bias) / gain


def _dot(how: How, z: Array, at: tuple[Array, Array, Array], dots: tuple) -> Array:
    """Returns the derivative of z along those of x, gain, bias, mean and var, in two reductions once transposed."""
    gain, bias, var = at
    x_dot, gain_dot, bias_dot, mean_dot, var_dot = (dot.astype(gain.dtype) for dot in dots)
    inverse = lax.rsqrt(var + how.reduction.epsilon).astype(gain.dtype)
    slope = gain_dot - gain * inverse**2 * var_dot / 2
    offset = bias_dot - gain * inverse * mean_dot
    slope, offset = vary_like(z, slope, offset)
    (multiplier,) = vary_like(z, gain * inverse)  # apart: it is no tangent
    y_dot = _normalized(how, z, gain, bias) * slope + offset + x_dot * multiplier
    return (how.activation.derivative(z.astype(gain.dtype)) * y_dot).astype(z.dtype)
