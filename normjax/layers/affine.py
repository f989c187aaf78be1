"""Normalizes x by given statistics; initializes scale and bias, and gives them the rank of x."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import constant, ones, zeros
from jaxtyping import Array, Inexact

from normjax import _checks
from normjax._checks import other_axes
from normjax._leaves import SCALARS
from normjax._typing import (
    Activations,
    DTypeLike,
    Initializer,
    Params,
    PRNGKey,
    promote,
    widen,
)
from normjax.platforms.cpu import materialize, separate_if_narrow, separate_operands
from normjax.platforms.plain import custom_jvp
from normjax.statistics.devices import pcast_like
from normjax.statistics.elements import Input, named, times
from normjax.statistics.spec import Spec


def init_params(
    function: str,
    num_features: int | Sequence[int],
    makers: dict[str, tuple[bool, Initializer]],
    key: PRNGKey | None,
    dtype: DTypeLike,
    scale_offset: float = 0.0,
) -> Params:
    """Initializes a leaf of the features' shape for each maker in use, each with its own key."""
    features = _checks.sizes(function, "num_features", num_features)
    initializers = {leaf: maker for leaf, (used, maker) in makers.items() if used}
    if "scale" in initializers:
        initializers["scale"] = initial_scale(initializers["scale"], scale_offset)
    if not jnp.issubdtype(dtype, jnp.inexact):
        _checks.raise_error(
            function,
            "param_dtype is not floating-point",
            expected="a floating-point or complex dtype",
            got=f"param_dtype={jnp.dtype(dtype)}",
            fix="Use jnp.float32, and dtype=... of the layer for the dtype of its output",
            kind=TypeError,
        )
    keys = [None] * len(initializers) if key is None else jax.random.split(key, len(initializers))
    try:
        return {
            leaf: initializer(leaf_key, features, dtype)
            for leaf_key, (leaf, initializer) in zip(keys, initializers.items(), strict=True)
        }
    except (TypeError, AttributeError) as error:
        if key is not None:
            raise
        raise TypeError(
            f"{function}: an initializer failed without a key. "
            f"Expected a key for a random initializer; "
            f"got key=None with {sorted(initializers)}. Pass key=jax.random.key(0)."
        ) from error


def initial_scale(scale_init: Initializer, offset: float, start: int = 1) -> Initializer:
    """Returns the initializer of the stored scale. By default, scale plus offset equals `start`.

    The default initializer is `ones` if `start` is 1, and `zeros` if it is 0.
    """
    default = ones if start else zeros
    return constant(start - offset) if offset and scale_init is default else scale_init


def lay_out(params: Params, rank: int, spec: Spec) -> Params:
    """Gives leaves `(*leading, *features)` the rank of x, and adds the offset to the scale.

    Leading dimension i belongs to the i-th non-feature axis of x. Scalars stay as they are.
    """
    feature_axes = spec.feature_axes
    others = other_axes(feature_axes, rank)
    laid_out = dict(params)
    for leaf, value in params.items():
        if leaf in SCALARS:
            continue
        axes = (*others[: value.ndim - len(feature_axes)], *feature_axes)
        if len(axes) > len(feature_axes):
            value = value.transpose(sorted(range(value.ndim), key=axes.__getitem__))
        laid_out[leaf] = jnp.expand_dims(value, others[value.ndim - len(feature_axes) :])
    if "scale" in laid_out and spec.scale_offset:
        laid_out["scale"] = widen(laid_out["scale"]) + spec.scale_offset
    return laid_out


def normalize(
    x: Input,
    mean: Inexact[Array, "..."] | None,
    var: Inexact[Array, "..."],
    params: Params,
    epsilon: float | Array,
    unit: float = 1.0,
) -> Activations:
    r"""Returns `(x - mean) / sqrt(var + epsilon) * scale + bias` in the widest dtype among them.

    Args:
      x: the input.
      mean: mean of x, with its rank; None to subtract nothing.
      var: variance of `unit * x`, or the mean of its squares, with the rank of x.
      params: `scale` and `bias`, both optional, with the rank of x.
      epsilon: added to the variance of x.
      unit: a power of two; 1 if `var` is the variance of x itself.

    Returns:
      y. If the mask hides a NaN or an infinity, its y is the bias, which derivatives treat as a
      constant.
    """
    mean = jnp.zeros((), x.x32.dtype) if mean is None else mean
    dtype = promote(x.x32.dtype, mean.dtype, var.dtype, *[leaf.dtype for leaf in params.values()])
    scale, bias = pcast_like(var, *scale_and_bias(params, dtype))
    wide = Input(x.x, x.x32.astype(dtype))
    total = widen(var)
    if not (isinstance(epsilon, float) and epsilon == 0):
        total += epsilon * unit**2
    y = _affine(unit, wide, mean.astype(dtype), total, scale, bias)
    return y if x.sound is None else jnp.where(x.sound, y, lax.stop_gradient(bias))


def scale_and_bias(params: Params, dtype: DTypeLike) -> tuple[Array, Array]:
    """Returns scale and bias in a dtype; a missing scale is 1, and a missing bias is 0."""
    scale = params["scale"].astype(dtype) if "scale" in params else jnp.ones((), dtype)
    bias = params["bias"].astype(dtype) if "bias" in params else jnp.zeros((), dtype)
    return scale, bias


@partial(custom_jvp, nondiff_argnums=(0,))
def inverse_deviation(unit: float, var: Array) -> Array:
    """Returns 1 / sqrt(var / unit^2)."""
    return times(lax.rsqrt(var), unit)


@inverse_deviation.defjvp
def _inverse_deviation_jvp(unit: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Multiplies right to left, since the cube of the inverse underflows at deviations of 1e13."""
    inverse = named(inverse_deviation(unit, *primals))
    root = times(inverse, 1 / unit)
    return inverse, -0.5 * inverse * (root * (root * tangents[0]))


@partial(custom_jvp, nondiff_argnums=(0,))
def _affine(unit: float, x: Input, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
    """Returns `(x - mean) / sqrt(var / unit^2) * scale + bias`."""
    inverse = times(lax.rsqrt(var), unit).astype(mean.dtype)
    if scale.shape == inverse.shape:
        return (x.x32 - mean) * (inverse * scale) + bias
    return (x.x32 - mean) * inverse * scale + bias


@_affine.defjvp
def _affine_jvp(unit: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, mean, var, scale, _ = primals
    x_dot, mean_dot, var_dot, scale_dot, bias_dot = tangents
    inverse, inverse_dot = jax.jvp(partial(inverse_deviation, unit), (var,), (var_dot,))
    inverse, inverse_dot = inverse.astype(mean.dtype), inverse_dot.astype(mean.dtype)
    fits = jnp.broadcast_shapes(scale.shape, inverse.shape) == inverse.shape
    derivative = _by_multiplier if fits else _by_scale
    dots = x_dot.x32, mean_dot, inverse_dot, scale_dot, bias_dot
    return _affine(unit, *primals), derivative(x.x, mean, inverse, scale, *dots)


def _by_multiplier(
    x: Array,
    mean: Array,
    inverse: Array,
    scale: Array,
    x_dot: Array,
    mean_dot: Array,
    inverse_dot: Array,
    scale_dot: Array,
    bias_dot: Array,
) -> Array:
    r"""Returns the derivative in terms of the multiplier :math:`m = s / \sigma`, as small as sigma.

    .. math:: dy = m\, dx + (x - \mu)\, dm + (d\beta - m\, d\mu)

    The two parts of the last term are added before they are broadcast to the size of x. The
    backward pass then reduces two arrays of that size (the gradients of multiplier and offset)
    instead of three.
    """
    multiplier = inverse * scale
    multiplier_dot = inverse_dot * scale + inverse * scale_dot
    offset_dot = bias_dot - mean_dot * multiplier
    if scale.shape != inverse.shape:
        multiplier_dot, offset_dot = materialize(multiplier_dot, offset_dot)
    multiplier_dot, offset_dot = pcast_like(x_dot, multiplier_dot, offset_dot)
    (multiplier,) = pcast_like(x_dot, multiplier)  # cast by itself, since it is not a tangent
    (x,) = separate_if_narrow(x, 1)
    centered = x.astype(mean.dtype) - mean
    return x_dot * multiplier + centered * multiplier_dot + offset_dot


def _by_scale(
    x: Array,
    mean: Array,
    inverse: Array,
    scale: Array,
    x_dot: Array,
    mean_dot: Array,
    inverse_dot: Array,
    scale_dot: Array,
    bias_dot: Array,
) -> Array:
    r"""Returns the derivative for per-example statistics, for which m would be as large as x.

    .. math:: dy = \frac{s}{\sigma}\, dx + (x - \mu) s\, d\sigma^{-1} - s\, \frac{d\mu}{\sigma}
                   + \frac{x - \mu}{\sigma}\, ds + d\beta

    Each term except the first and the last becomes a reduction in the backward pass. Each reduction
    gets its own copies of the operands.
    """
    inverse_dot, center_dot = pcast_like(x_dot, inverse_dot, -inverse * mean_dot)
    scale_dot, bias_dot = pcast_like(x_dot, scale_dot, bias_dot)
    own = zip(*(separate_operands(each, 4) for each in (x, mean, inverse, scale)), strict=True)
    (
        (_, _, a_inverse, a_scale),
        (b, b_mean, _, b_scale),
        (_, _, _, c_scale),
        (d, d_mean, d_inverse, _),
    ) = own
    dy = x_dot * a_inverse * a_scale
    dy += (b.astype(mean.dtype) - b_mean) * b_scale * inverse_dot
    dy += c_scale * center_dot
    return dy + (d.astype(mean.dtype) - d_mean) * d_inverse * scale_dot + bias_dot


def scale_and_shift(x: Activations, params: Params) -> Activations:
    """Returns `x * scale + bias` in the widest dtype among them; both are optional."""
    leaves = {leaf: params[leaf] for leaf in ("scale", "bias") if leaf in params}
    dtype = promote(x.dtype, *(leaf.dtype for leaf in leaves.values()))
    leaves = dict(zip(leaves, pcast_like(x, *leaves.values()), strict=True))
    y = x.astype(dtype)
    if "scale" in leaves:
        y *= leaves["scale"].astype(dtype)
    return y + leaves["bias"].astype(dtype) if "bias" in leaves else y
