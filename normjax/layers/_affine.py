"""Scale and shift: what a layer does once it has its statistics, and the parameters that it does it with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from normjax import _checks
from normjax._typing import (
    Activations,
    DTypeLike,
    FeatureArray,
    Initializer,
    Mask,
    Params,
    PRNGKey,
    promote,
)
from normjax.statistics.reduction import apart, apart_if_narrow, named, written_out
from normjax.statistics.sharing import vary_like


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


def lay_out(leaf: FeatureArray, rank: int, feature_axes: tuple[int, ...]) -> Array:
    """Gives `(*leading, *features)` the rank of x: leading dimension i is that of the i-th axis that is no feature."""
    others = _checks.other_axes(feature_axes, rank)
    axes = (*others[: leaf.ndim - len(feature_axes)], *feature_axes)
    return jnp.expand_dims(
        leaf.transpose(sorted(range(leaf.ndim), key=axes.__getitem__)),
        _checks.other_axes(axes, rank),
    )


def normalize(
    x: Activations,
    wide: Activations,
    mean: Inexact[Array, "..."] | None,
    var: Inexact[Array, "..."],
    params: Params,
    *,
    mask: Mask | None,
    epsilon: float | Array,
) -> Activations:
    r"""Returns `(x - mean) / sqrt(var + epsilon) * scale + bias` in the widest dtype among them.

    Where the mask hides a NaN or an infinity, y is the bias, a constant.

    Args:
      x: the input as it came, from which the backward pass takes it.
      wide: `widen(x)`, which gradients flow through.
      mean: of x, with its rank; None to subtract nothing.
      var: of x, or the mean of its squares, likewise.
      params: `scale` and `bias`, or what there is of them, likewise.
      mask: None, or bool, likewise.
      epsilon: added to the variance.
    """
    if mask is None:
        return _normalize(x, wide, mean, var, params, epsilon)
    # A NaN times a gradient of zero is NaN: it must not get as far as the derivative of the scale.
    sound = mask | jnp.isfinite(wide)
    center = (
        jnp.zeros((), wide.dtype) if mean is None else lax.stop_gradient(mean).astype(wide.dtype)
    )
    wide = jnp.where(sound, wide, center)
    y = _normalize(wide, wide, mean, var, params, epsilon)
    return jnp.where(sound, y, lax.stop_gradient(y))


def _normalize(
    x: Array, wide: Array, mean: Array | None, var: Array, params: Params, epsilon: float | Array
) -> Array:
    mean = jnp.zeros((), wide.dtype) if mean is None else mean
    dtype = promote(*(leaf.dtype for leaf in (wide, mean, var, *params.values())))
    inverse = _inverse_root(var + epsilon).astype(dtype)
    leaves = {"scale": jnp.ones((), dtype), "bias": jnp.zeros((), dtype)} | params
    scale, bias = (leaves[leaf].astype(dtype) for leaf in ("scale", "bias"))
    return _affine(wide.astype(dtype), x, mean.astype(dtype), inverse, *vary_like(var, scale, bias))


@jax.custom_jvp
def _inverse_root(x: Array) -> Array:
    r"""Returns :math:`x^{-1/2}`, whose derivative is its cube, and is kept for the backward pass instead of x."""
    return lax.rsqrt(x)


@_inverse_root.defjvp
def _inverse_root_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    inverse = named(_inverse_root(*primals))
    return inverse, -0.5 * inverse * inverse * inverse * tangents[0]


@jax.custom_jvp
def _affine(wide: Array, x: Array, mean: Array, inverse: Array, scale: Array, bias: Array) -> Array:
    """Returns `(x - mean) * inverse * scale + bias`."""
    if scale.shape == inverse.shape:
        return (wide - mean) * (inverse * scale) + bias
    return (wide - mean) * inverse * scale + bias


@_affine.defjvp
def _affine_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    inverse, scale = primals[3:5]
    fits = jnp.broadcast_shapes(scale.shape, inverse.shape) == inverse.shape
    return _affine(*primals), (_by_multiplier if fits else _by_scale)(primals, tangents)


def _by_multiplier(primals: tuple, tangents: tuple) -> Array:
    r"""The derivative by way of the multiplier :math:`m = s / \sigma`, which is no larger than the statistics.

    .. math:: dy = m\, dx + (x - \mu)\, dm + (d\beta - m\, d\mu)

    The last term is added up before it meets x: so the backward pass reduces two arrays of x's size
    (the gradients of multiplier and offset) instead of three.
    """
    _, x, mean, inverse, scale, _ = primals
    dx, _, d_mean, d_inverse, d_scale, d_bias = tangents
    multiplier, d_multiplier = inverse * scale, d_inverse * scale + inverse * d_scale
    d_offset = d_bias - d_mean * multiplier
    if scale.shape != inverse.shape:
        d_multiplier, d_offset = written_out(d_multiplier, d_offset)
    d_multiplier, d_offset = vary_like(dx, d_multiplier, d_offset)
    (multiplier,) = vary_like(dx, multiplier)  # apart: it is no tangent
    x = apart_if_narrow(x)
    return dx * multiplier + (x.astype(mean.dtype) - mean) * d_multiplier + d_offset


def _by_scale(primals: tuple, tangents: tuple) -> Array:
    r"""The derivative where each example has statistics of its own: the multiplier would be as large as x.

    .. math:: dy = \frac{s}{\sigma}\, dx + (x - \mu) s\, d\sigma^{-1} - s\, \frac{d\mu}{\sigma}
                   + \frac{x - \mu}{\sigma}\, ds + d\beta

    Each term but the first and the last is a reduction in the backward pass, of operands that it
    has to itself.
    """
    _, x, mean, inverse, scale, _ = primals
    dx, _, d_mean, d_inverse, d_scale, d_bias = tangents
    d_inverse, d_center = vary_like(dx, d_inverse, -inverse * d_mean)
    d_scale, d_bias = vary_like(dx, d_scale, d_bias)
    x, mean, inverse, scale = apart(x, mean, inverse, scale)
    dy = dx * inverse * scale
    x, mean, inverse, scale = apart(x, mean, inverse, scale)
    dy += (x.astype(mean.dtype) - mean) * scale * d_inverse
    x, mean, inverse, scale = apart(x, mean, inverse, scale)
    dy += scale * d_center
    x, mean, inverse, scale = apart(x, mean, inverse, scale)
    return dy + (x.astype(mean.dtype) - mean) * inverse * d_scale + d_bias


def scale_and_shift(x: Activations, params: Params) -> Activations:
    """Returns `x * scale + bias` in the widest dtype among them, or what there is of it."""
    leaves = {leaf: params[leaf] for leaf in ("scale", "bias") if leaf in params}
    dtype = promote(x.dtype, *(leaf.dtype for leaf in leaves.values()))
    leaves = dict(zip(leaves, vary_like(x, *leaves.values()), strict=True))
    y = x.astype(dtype)
    if "scale" in leaves:
        y *= leaves["scale"].astype(dtype)
    return y + leaves["bias"].astype(dtype) if "bias" in leaves else y
