"""Functions `(params, batch_stats, kernel, train)` that normalize kernels, not activations."""

from normjax.weights.spectral_norm import spectral_norm, spectral_norm_init
from normjax.weights.weight_norm import weight_norm, weight_norm_init, weight_norm_init_from_data
from normjax.weights.weight_standardization import (
    weight_standardization,
    weight_standardization_init,
)

__all__ = [
    "spectral_norm",
    "spectral_norm_init",
    "weight_norm",
    "weight_norm_init",
    "weight_norm_init_from_data",
    "weight_standardization",
    "weight_standardization_init",
]
