"""Code that the nnx adapters share: variables, Flax's dtype promotion, common arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype

from normjax import _checks
from normjax._typing import Axes, DTypeLike, Initializer, Params, admissible, as_mask

Leaves = dict[str, jax.Array | None]


def declare(
    norm: Any,
    leaf: str,
    used: bool,
    init: Initializer,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    metadata: Mapping[str, Any],
) -> None:
    """Adds a parameter to the module, or None if it is not used, as Flax does."""
    setattr(
        norm,
        leaf,
        nnx.Param(init(rngs.params(), shape, dtype), **metadata) if used else nnx.data(None),
    )


def read(norm: Any, *leaves: str) -> Leaves:
    """Returns the values of the named parameters; None for a parameter that is not used."""
    variables = {leaf: getattr(norm, leaf) for leaf in leaves}
    return {
        leaf: None if variable is None else variable[...] for leaf, variable in variables.items()
    }


def present(leaves: Leaves, norm: Any, x: jax.Array, feature_axes: Axes = -1) -> Params:
    """Returns the parameters that are used, in the shape of the feature axes.

    Flax stores them flat if there are several feature axes.
    """
    kept = _checks.axes(type(norm).__name__, "feature_axes", feature_axes, x.shape)
    features = tuple(x.shape[axis] for axis in kept)
    return {
        leaf: value.reshape(features) if len(kept) > 1 and value.ndim == 1 else value
        for leaf, value in leaves.items()
        if value is not None
    }


def promoted(
    norm: Any, x: jax.Array, leaves: Leaves, statistics: tuple[jax.Array, ...] = ()
) -> tuple[jax.Array, Any]:
    """Returns x in a dtype that the functions accept, and the dtype of y.

    `promote_dtype` gets `(x, *statistics, *leaves)`; the dtype of y is what Flax then promotes x
    and the leaves to. It is found by abstract evaluation, without computing anything.
    """

    def output(arrays: tuple) -> jax.Array:
        x, *values = norm.promote_dtype(arrays, dtype=norm.dtype)
        return jnp.zeros((), canonicalize_dtype(x, *values[len(statistics) :], dtype=norm.dtype))

    arrays = x, *statistics, *leaves.values()
    try:
        dtype = jax.eval_shape(output, arrays).dtype
    except jax.dtypes.TypePromotionError:
        _checks.no_common_dtype(type(norm).__name__, *arrays)
    return admissible(x, dtype), dtype


def common(norm: Any, mask: Any) -> dict[str, Any]:
    """Returns the arguments that all layers with statistics share."""
    return {
        "scale_offset": norm.scale_offset,
        "epsilon": norm.epsilon,
        "mask": as_mask(mask),
        "axis_name": norm.axis_name,
        "axis_index_groups": norm.axis_index_groups,
    }
