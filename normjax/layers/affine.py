"""Scale and shift: what a layer does once it has its statistics, and the parameters that it does it with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from normjax import _checks
from normjax._checks import SCALARS, other_axes
from normjax._typing import (
    Activations,
    DTypeLike,
    FeatureArray,
    Initializer,
    Params,
    PRNGKey,
    promote,
)
from normjax.platforms.cpu import materialize, separate_if_narrow, separate_operands
from normjax.platforms.plain import custom_jvp
from normjax.statistics.devices import pcast_like
from normjax.statistics.reduction import Input, named


def init_params(
    function: str,
    num_features: int | Sequence[int],
    makers: dict[str, tuple[bool, Initializer]],
    key: PRNGKey | None,
    dtype: DTypeLike,
) -> Params:
    """Returns a leaf for each maker that is used, of the features' shape and from a key of its own."""
    features = _checks.sizes(function, "num_features", num_features)
    initializers = {leaf: maker for leaf, (used, maker) in makers.items() if used}
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
            f"{function}: an initializer failed without a key. Expected a key for a random initializer; "
            f"got key=None with {sorted(initializers)}. Pass key=jax.random.key(0)."
        ) from error


def lay_out(params: Params, rank: int, feature_axes: tuple[int, ...]) -> Params:
    """Gives leaves `(*leading, *features)` the rank of x; scalars stay as they are.

    Leading dimension i is that of the i-th non-feature axis of x.
    """
    return {
        leaf: value if leaf in SCALARS else _lay_out(value, rank, feature_axes)
        for leaf, value in params.items()
    }


def _lay_out(leaf: FeatureArray, rank: int, feature_axes: tuple[int, ...]) -> Array:
    extra = leaf.ndim - len(feature_axes)
    if not extra:
        return jnp.expand_dims(leaf, other_axes(feature_axes, rank))
    leading = other_axes(feature_axes, rank)[:extra]
    axes = (*leading, *feature_axes)
    in_order = leaf.transpose(sorted(range(leaf.ndim), key=axes.__getitem__))
    return jnp.expand_dims(in_order, other_axes(axes, rank))


def normalize(
    x: Input,
    mean: Inexact[Array, "..."] | None,
    var: Inexact[Array, "..."],
    params: Params,
    epsilon: float | Array,
) -> Activations:
    r"""Returns `(x - mean) / sqrt(var + epsilon) * scale + bias` in the widest dtype among them.

    Args:
      x: the input.
      mean: of x, with its rank; None to subtract nothing.
      var: of x, or the mean of its squares, with its rank.
      params: `scale` and `bias`, or what there is of them, with the rank of x.
      epsilon: added to the variance.

    Returns:
      y; the bias, a constant, where the mask hides a NaN or an infinity.
    """
    mean = jnp.zeros((), x.x32.dtype) if mean is None else mean
    dtype = promote(x.x32.dtype, mean.dtype, var.dtype, *(leaf.dtype for leaf in params.values()))
    scale = params["scale"].astype(dtype) if "scale" in params else jnp.ones((), dtype)
    bias = params["bias"].astype(dtype) if "bias" in params else jnp.zeros((), dtype)
    scale, bias = pcast_like(var, scale, bias)
    wide = Input(x.x, x.x32.astype(dtype))
    y = _affine(wide, mean.astype(dtype), var + epsilon, scale, bias)
    return y if x.sound is None else jnp.where(x.sound, y, lax.stop_gradient(bias))


@custom_jvp
def _affine(x: Input, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
    """Returns `(x - mean) / sqrt(var) * scale + bias`."""
    inverse = lax.rsqrt(var).astype(mean.dtype)
    if scale.shape == inverse.shape:
        return (x.x32 - mean) * (inverse * scale) + bias
    return (x.x32 - mean) * inverse * scale + bias


@_affine.defjvp
def _affine_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, mean, var, scale, _ = primals
    inverse = named(lax.rsqrt(var))
    x_dot, mean_dot, var_dot, scale_dot, bias_dot = tangents
    # From right to left, so that the cube of the inverse is never formed: it underflows at
    # deviations of 1e13.
    inverse_dot = -0.5 * inverse * (inverse * (inverse * var_dot))
    inverse, inverse_dot = inverse.astype(mean.dtype), inverse_dot.astype(mean.dtype)
    fits = jnp.broadcast_shapes(scale.shape, inverse.shape) == inverse.shape
    derivative = _by_multiplier if fits else _by_scale
    dots = x_dot.x32, mean_dot, inverse_dot, scale_dot, bias_dot
    return _affine(*primals), derivative(x.x, mean, inverse, scale, *dots)


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
    r"""The derivative by way of the multiplier :math:`m = s / \sigma`, which is not larger than \sigma.

    .. math:: dy = m\, dx + (x - \mu)\, dm + (d\beta - m\, d\mu)

    The last term is added up before it meets x. So the backward pass reduces two arrays of x's size
    (the gradients of multiplier and offset) instead of three.
    """
    multiplier = inverse * scale
    multiplier_dot = inverse_dot * scale + inverse * scale_dot
    offset_dot = bias_dot - mean_dot * multiplier
    if scale.shape != inverse.shape:
        multiplier_dot, offset_dot = materialize(multiplier_dot, offset_dot)
    multiplier_dot, offset_dot = pcast_like(x_dot, multiplier_dot, offset_dot)
    (multiplier,) = pcast_like(x_dot, multiplier)  # alone: it is not a tangent
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
    r"""The derivative where each example has statistics of its own: m would be as large as x.

    .. math:: dy = \frac{s}{\sigma}\, dx + (x - \mu) s\, d\sigma^{-1} - s\, \frac{d\mu}{\sigma}
                   + \frac{x - \mu}{\sigma}\, ds + d\beta

    Each term but the first and the last is a reduction in the backward pass, of operands that it
    has to itself.
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
    """Returns `x * scale + bias` in the widest dtype among them, or what there is of it."""
    leaves = {leaf: params[leaf] for leaf in ("scale", "bias") if leaf in params}
    dtype = promote(x.dtype, *(leaf.dtype for leaf in leaves.values()))
    leaves = dict(zip(leaves, pcast_like(x, *leaves.values()), strict=True))
    y = x.astype(dtype)
    if "scale" in leaves:
        y *= leaves["scale"].astype(dtype)
    return y + leaves["bias"].astype(dtype) if "bias" in leaves else y
