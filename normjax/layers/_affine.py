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
        _checks.refuse(
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
    mean: Inexact[Array, "..."] | None,
    var: Inexact[Array, "..."],
    params: Params,
    *,
    mask: Mask | None,
    epsilon: float | Array,
) -> Activations:
    r"""Returns `(x - mean) * (scale / sqrt(var + epsilon)) + bias` in the widest dtype among them.

    Written around the mean's value `c`, a constant to the derivative, with `m = scale / sqrt(var + epsilon)`:

    .. math:: y = (x - c) m + (\beta - (\mu - c) m)

    The second term equals the bias, and carries the derivative of the mean through arrays of the features' size. So the
    backward pass reduces two arrays of x's size (the gradients of m and of the second term) instead of three.

    Where the mask hides a NaN or an infinity, y is the bias, a constant.

    Args:
      x: the input in at least float32.
      mean: of x, with its rank; None to subtract nothing.
      var: of x, or the mean of its squares, likewise.
      params: `scale` and `bias`, or what there is of them, likewise.
      mask: None, or bool, likewise.
      epsilon: added to the variance.
    """
    if mask is None:
        return _normalize(x, mean, var, params, epsilon)
    # A NaN times a gradient of zero is NaN: it must not get as far as the derivative of the scale.
    sound = mask | jnp.isfinite(x)
    center = jnp.zeros((), x.dtype) if mean is None else lax.stop_gradient(mean).astype(x.dtype)
    y = _normalize(jnp.where(sound, x, center), mean, var, params, epsilon)
    return jnp.where(sound, y, lax.stop_gradient(y))


def _normalize(x: Array, mean: Array | None, var: Array, params: Params, epsilon: float | Array) -> Array:
    dtype = promote(*(leaf.dtype for leaf in (x, var, *params.values())), x.dtype if mean is None else mean.dtype)
    params = dict(zip(params, vary_like(var, *params.values()), strict=True))
    multiplier = lax.rsqrt(var + epsilon).astype(dtype)
    if "scale" in params:
        multiplier *= params["scale"].astype(dtype)
    offset = params["bias"].astype(dtype) if "bias" in params else jnp.zeros((), dtype)
    if mean is None:
        multiplier, offset = vary_like(x, multiplier, offset)
        return x.astype(dtype) * multiplier + offset
    mean = mean.astype(dtype)
    center = lax.stop_gradient(mean)
    multiplier, offset = vary_like(x, multiplier, offset - (mean - center) * multiplier)
    return (x.astype(dtype) - center) * multiplier + offset


def scale_and_shift(x: Activations, params: Params) -> Activations:
    """Returns `x * scale + bias` in the widest dtype among them, or what there is of it."""
    leaves = {leaf: params[leaf] for leaf in ("scale", "bias") if leaf in params}
    dtype = promote(x.dtype, *(leaf.dtype for leaf in leaves.values()))
    leaves = dict(zip(leaves, vary_like(x, *leaves.values()), strict=True))
    y = x.astype(dtype)
    if "scale" in leaves:
        y *= leaves["scale"].astype(dtype)
    return y + leaves["bias"].astype(dtype) if "bias" in leaves else y
