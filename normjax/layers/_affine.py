"""Scale and shift: what a layer does once it has its statistics, and the parameters that it does it with."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from normjax import _checks
from normjax._typing import Activations, DTypeLike, Initializer, Params, PRNGKey, promote
from normjax.statistics.sharing import vary_like


def init_params(
    function: str,
    features: tuple[int, ...],
    initializers: dict[str, Initializer],
    key: PRNGKey | None,
    dtype: DTypeLike,
) -> Params:
    """Returns one leaf per initializer, each of shape `features`, each from a key of its own."""
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


def normalize(
    x: Activations,
    mean: Inexact[Array, "*statistics"],
    var: Inexact[Array, "*statistics"],
    params: Params,
    *,
    axes: Sequence[int],
    epsilon: float,
) -> Activations:
    r"""Returns `(x - mean) * (scale / sqrt(var + epsilon)) + bias` in the widest dtype among them.

    Written around the mean's value `c`, a constant to the derivative, with `m = scale / sqrt(var + epsilon)`:

    .. math:: y = (x - c) m + (\beta - (\mu - c) m)

    The second term equals the bias, and carries the derivative of the mean through arrays of the features' size. So the
    backward pass reduces two arrays of x's size (the gradients of m and of the second term) instead of three.

    Args:
      x: the input in at least float32.
      mean: of x without its reduced axes.
      var: likewise.
      params: `scale` and `bias`, or what there is of them, broadcastable to the mean.
      axes: the reduced axes of x, which mean and var are broadcast along.
      epsilon: added to the variance.
    """
    dtype = promote(*(leaf.dtype for leaf in (x, mean, var, *params.values())))
    mean = mean.astype(dtype)
    center = lax.stop_gradient(mean)
    multiplier = lax.rsqrt(var + epsilon).astype(dtype)
    if "scale" in params:
        multiplier *= params["scale"].astype(dtype)
    offset = -(mean - center) * multiplier
    if "bias" in params:
        offset += params["bias"].astype(dtype)
    multiplier, offset = vary_like(x, *jnp.broadcast_arrays(multiplier, offset))
    center, multiplier, offset = (jnp.expand_dims(part, axes) for part in (center, multiplier, offset))
    return (x.astype(dtype) - center) * multiplier + offset
