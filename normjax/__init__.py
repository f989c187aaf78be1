"""Normalization layers for JAX as pure functions with explicit batch statistics.

    params, batch_stats = nj.batch_norm_init(num_features)
    y, batch_stats = nj.batch_norm(params, batch_stats, x, train=True)

The doors for Flax models, `normjax.linen` and `normjax.nnx`, load on first use.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from normjax.layers.batch_norm import batch_norm, batch_norm_init
from normjax.statistics.moments import merge_moments, moments
from normjax.statistics.running import update_batch_stats
from normjax.statistics.safe_moments import Moments

if TYPE_CHECKING:
    from normjax import linen, nnx

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "batch_norm",
    "batch_norm_init",
    "linen",
    "merge_moments",
    "moments",
    "nnx",
    "update_batch_stats",
]

_DOORS = ("linen", "nnx")


def __getattr__(name: str) -> ModuleType:
    """Imports a door, and with it Flax, when it is first asked for."""
    if name in _DOORS:
        return importlib.import_module(f"normjax.{name}")
    raise AttributeError(f"module 'normjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
