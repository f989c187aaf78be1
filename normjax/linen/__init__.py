"""Adapters for `flax.linen`: Flax's arguments, names and variables, computed by normjax.

If the network computes a scale and bias for each example (FiLM, adaLN, AdaIN), they are not
variables, and no adapter is needed. Call this function in the module: `normjax.layer_norm({"scale":
scale, "bias": bias}, {}, x, train=False)`.
"""

from typing import Never

from normjax._foreign import explain_constructor, where_is_class
from normjax.linen.batch_norm import BatchNorm
from normjax.linen.batch_renorm import BatchRenorm
from normjax.linen.dynamic_tanh import DynamicTanh
from normjax.linen.filter_response_norm import FilterResponseNorm
from normjax.linen.global_response_norm import GlobalResponseNorm
from normjax.linen.group_norm import GroupNorm
from normjax.linen.instance_norm import InstanceNorm
from normjax.linen.layer_norm import LayerNorm
from normjax.linen.local_response_norm import LocalResponseNorm
from normjax.linen.rms_norm import RMSNorm
from normjax.linen.spectral_norm import SpectralNorm
from normjax.linen.weight_norm import WeightNorm
from normjax.linen.weight_standardization import WeightStandardization

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "DynamicTanh",
    "FilterResponseNorm",
    "GlobalResponseNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LocalResponseNorm",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
    "WeightStandardization",
]

for _name in __all__:
    explain_constructor(globals()[_name])


def __getattr__(name: str) -> Never:
    """Raises the error for names of other libraries, such as `BatchNorm2d`."""
    raise AttributeError(where_is_class(name, "linen", __all__))
