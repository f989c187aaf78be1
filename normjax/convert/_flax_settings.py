"""Finds the keyword arguments for which a normjax function equals a Flax layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from normjax import _checks
from normjax.layers.batch_norm import batch_norm
from normjax.layers.batch_renorm import batch_renorm
from normjax.layers.dynamic_tanh import dynamic_tanh
from normjax.layers.filter_response_norm import filter_response_norm
from normjax.layers.global_response_norm import global_response_norm
from normjax.layers.group_norm import group_norm
from normjax.layers.instance_norm import instance_norm
from normjax.layers.layer_norm import layer_norm
from normjax.layers.local_response_norm import local_response_norm
from normjax.layers.rms_norm import rms_norm
from normjax.weights.spectral_norm import spectral_norm
from normjax.weights.weight_norm import weight_norm
from normjax.weights.weight_standardization import weight_standardization

if TYPE_CHECKING:
    from flax import linen, nnx

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "BatchRenorm": batch_renorm,  # before its base class BatchNorm
    "BatchNorm": batch_norm,
    "LayerNorm": layer_norm,
    "RMSNorm": rms_norm,
    "GroupNorm": group_norm,
    "InstanceNorm": instance_norm,
    "FilterResponseNorm": filter_response_norm,
    "GlobalResponseNorm": global_response_norm,
    "LocalResponseNorm": local_response_norm,
    "DynamicTanh": dynamic_tanh,
    "WeightNorm": weight_norm,
    "WeightStandardization": weight_standardization,
    "SpectralNorm": spectral_norm,
}
RENAMED = {"axis": "feature_axes", "fixed_epsilon": "epsilon"}


def flax_settings(layer: linen.Module | nnx.Module) -> dict[str, Any]:
    """Returns the arguments for which a normjax function computes the same as this Flax layer.

    The defaults of the functions differ from those of Flax's layers: `epsilon` is 1e-5 in
    `layer_norm` and 1e-6 in `flax.linen.LayerNorm`.

    Args:
      layer: a normalization layer of `flax.linen`, `flax.nnx`, `normjax.linen` or `normjax.nnx`, or
        one of their wrappers that normalize weights. A linen module does not have to be bound.

    Returns:
      A dict of the keyword arguments that the layer determines, for the function of the same name
      (`nj.layer_norm` for a `LayerNorm`).

    Raises:
      TypeError: if the layer is of another kind, or is a class instead of a layer.

    Example:
      >>> from flax import linen as nn
      >>> import normjax as nj
      >>> print(nj.convert.flax_settings(nn.LayerNorm()))
      {'reduction_axes': -1, 'feature_axes': -1, 'epsilon': 1e-06}
    """
    classes = {kind.__name__ for kind in type(layer).__mro__}
    for name, function in FUNCTIONS.items():
        if name in classes:
            return _arguments(layer, function)
    _checks.raise_error(
        "flax_settings",
        "normjax has no function for this layer",
        expected=f"a layer among {', '.join(sorted(FUNCTIONS))}",
        got=f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__,
        fix="Pass the layer itself, such as nn.LayerNorm() or model.norm",
        kind=TypeError,
    )


def _arguments(layer: Any, function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a function that are attributes of a layer."""
    given = vars(layer) | {
        name: vars(layer)[own] for own, name in RENAMED.items() if hasattr(layer, own)
    }
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        if not keyword or name not in given or (given[name] is None and parameter.default is None):
            continue
        found[name] = given[name]
    if "num_groups" in found:
        found.pop("group_size", None)  # flax.nnx stores both
    if found.get("feature_axes", 0) is None:
        found["feature_axes"] = ()  # in Flax's wrappers, None means one norm of the whole kernel
    return found
