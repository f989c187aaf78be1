"""Code that the linen adapters share: variables, Flax's dtype promotion, common arguments.

These are plain functions of the module, because Flax's summaries list each method of a module on a
line of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from normjax import _checks
from normjax._typing import Initializer, Params, admissible, as_mask
from normjax.layers.affine import initial_scale


def sizes(module: Any, x: jax.Array, name: str = "feature_axes") -> tuple[int, ...]:
    """Returns the sizes of the axes in the field `name` of the module, in ascending order."""
    kept = _checks.axes(type(module).__name__, name, getattr(module, name), x.shape)
    return tuple(map(x.shape.__getitem__, kept))


def declare(
    module: Any, features: tuple[int, ...], scale_init: Initializer | None = None, **used: bool
) -> Params:
    """Declares the parameters that are used, in the given order, each with its own initializer.

    `scale_init` initializes the stored scale; by default, scale plus offset is 1.
    """
    makers = {leaf: getattr(module, f"{leaf}_init") for leaf in used}
    if "scale" in used:
        makers["scale"] = scale_init or initial_scale(module.scale_init, module.scale_offset)
    params = {
        leaf: jnp.asarray(module.param(leaf, makers[leaf], features, module.param_dtype))
        for leaf, is_used in used.items()
        if is_used
    }
    if getattr(module, "force_float32_reductions", True):
        return params
    return {leaf: value.astype(module.param_dtype) for leaf, value in params.items()}


def promoted(module: Any, x: jax.Array, *values: jax.Array) -> tuple[jax.Array, Any]:
    """Returns x in a dtype that the functions accept, and the dtype of y.

    The dtype of y is what Flax promotes x and the parameters to.
    """
    try:
        dtype = canonicalize_dtype(x, *values, dtype=module.dtype)
    except jax.dtypes.TypePromotionError:
        _checks.no_common_dtype(type(module).__name__, x, *values)
    return admissible(x, dtype), dtype


def common(module: Any, mask: Any) -> dict[str, Any]:
    """Returns the arguments that all layers with statistics share.

    During initialization, there is no mapped axis, since it may run outside of `shard_map`.
    """
    mapped = not module.is_initializing()
    return {
        "scale_offset": module.scale_offset,
        "epsilon": module.epsilon,
        "mask": as_mask(mask),
        "axis_name": module.axis_name if mapped else None,
        "axis_index_groups": module.axis_index_groups if mapped else None,
    }
