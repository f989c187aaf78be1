"""Converts weights between normjax's `(params, batch_stats)` and other libraries.

    params, batch_stats = nj.convert.from_torch(module)  # or a state_dict, or a .safetensors path
    state_dict = nj.convert.to_torch(params, batch_stats)

The functions convert single layers and whole networks, whose trees are nested by module names. None
of these libraries is imported or has to be installed: a dict of NumPy arrays is enough.
"""

from normjax.convert._flax_settings import flax_settings
from normjax.convert._haiku_momentum import haiku_momentum
from normjax.convert._keras_settings import keras_settings
from normjax.convert._torch_settings import torch_settings
from normjax.convert.flax import linen_to_nnx, nnx_to_linen
from normjax.convert.haiku import from_haiku, to_haiku
from normjax.convert.keras import from_keras, to_keras
from normjax.convert.torch import from_torch, to_torch

__all__ = [
    "flax_settings",
    "from_haiku",
    "from_keras",
    "from_torch",
    "haiku_momentum",
    "keras_settings",
    "linen_to_nnx",
    "nnx_to_linen",
    "to_haiku",
    "to_keras",
    "to_torch",
    "torch_settings",
]
