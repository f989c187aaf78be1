"""Normalization layers for JAX as pure functions with explicit batch statistics.

    params, batch_stats = nj.batch_norm_init(num_features)
    y, batch_stats = nj.batch_norm(params, batch_stats, x, train=True)

The adapters for Flax models, `normjax.linen` and `normjax.nnx`, and the packages `normjax.convert`,
`normjax.deploy` (with `fold_batch_norm`), `normjax.diagnostics` and `normjax.optim` are imported on
first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from normjax import weights
from normjax._foreign import where_is
from normjax.layers.activated_batch_norm import activated_batch_norm, activated_batch_norm_init
from normjax.layers.batch_norm import batch_norm, batch_norm_init
from normjax.layers.batch_renorm import batch_renorm, batch_renorm_init
from normjax.layers.dynamic_tanh import dynamic_tanh, dynamic_tanh_init
from normjax.layers.filter_response_norm import filter_response_norm, filter_response_norm_init
from normjax.layers.global_response_norm import (
    global_response_norm,
    global_response_norm_init,
)
from normjax.layers.group_norm import group_norm, group_norm_init
from normjax.layers.instance_norm import instance_norm, instance_norm_init
from normjax.layers.layer_norm import layer_norm, layer_norm_init
from normjax.layers.local_response_norm import local_response_norm, local_response_norm_init
from normjax.layers.remat_policy import remat_policy
from normjax.layers.rms_norm import rms_norm, rms_norm_init
from normjax.layers.running_norm import running_norm, running_norm_init
from normjax.platforms.plain import plain_phrasing
from normjax.statistics.average import average_batch_stats
from normjax.statistics.merge import merge_moments
from normjax.statistics.moments import moments
from normjax.statistics.recalibrate import recalibrate
from normjax.statistics.running import update_batch_stats
from normjax.statistics.spec import Moments
from normjax.statistics.synchronize import sync_batch_stats

if TYPE_CHECKING:
    from normjax import convert, deploy, diagnostics, linen, nnx, optim
    from normjax.deploy.fold_layer import fold_batch_norm

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "activated_batch_norm",
    "activated_batch_norm_init",
    "average_batch_stats",
    "batch_norm",
    "batch_norm_init",
    "batch_renorm",
    "batch_renorm_init",
    "convert",
    "deploy",
    "diagnostics",
    "dynamic_tanh",
    "dynamic_tanh_init",
    "filter_response_norm",
    "filter_response_norm_init",
    "fold_batch_norm",
    "global_response_norm",
    "global_response_norm_init",
    "group_norm",
    "group_norm_init",
    "instance_norm",
    "instance_norm_init",
    "layer_norm",
    "layer_norm_init",
    "linen",
    "local_response_norm",
    "local_response_norm_init",
    "merge_moments",
    "moments",
    "nnx",
    "optim",
    "plain_phrasing",
    "recalibrate",
    "remat_policy",
    "rms_norm",
    "rms_norm_init",
    "running_norm",
    "running_norm_init",
    "sync_batch_stats",
    "update_batch_stats",
    "weights",
]

_PACKAGES = ("convert", "deploy", "diagnostics", "linen", "nnx", "optim")


def __getattr__(name: str) -> Any:
    """Imports a package and its dependencies on first use."""
    if name in _PACKAGES:
        return _load(name)
    if name == "fold_batch_norm":
        return importlib.import_module("normjax.deploy.fold_layer").fold_batch_norm
    raise AttributeError(where_is(name, _load, __all__))


def _load(name: str) -> Any:
    return importlib.import_module(f"normjax.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)
