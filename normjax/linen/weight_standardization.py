"""Weight standardization for `flax.linen`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import ones

from normjax._typing import Axes, DTypeLike, Initializer
from normjax.layers.standardize import EpsilonTo
from normjax.linen._shared import promoted
from normjax.linen._weights import chosen, scales, with_weights
from normjax.weights import weight_standardization


class WeightStandardization(nn.Module):
    """Wraps a layer with weight standardization.

    It is used like `normjax.linen.WeightNorm`. The parameters of the layer are initialized and
    stored as without the wrapper. With `use_scale`, the gains are variables (`params`:
    `Dense_0/kernel/scale` and so on). See `normjax.weights.weight_standardization` for the
    equations. Scalars and vectors are not standardized.

    Args:
      layer_instance: the layer to wrap.
      epsilon: added to the variance, or to the standard deviation; see `epsilon_to`.
      dtype: dtype of the normalized weights. None means the dtype that weights and scales promote
        to.
      param_dtype: dtype of the scales.
      use_scale: whether to use a learnable gain.
      scale_init: initializer of the gain.
      feature_axes: the axes along which each slice of a weight has its own statistics. None means
        one mean and variance for the whole weight.
      scaled: whether the variance is `1 / fan_in` instead of 1, for networks without activation
        normalization.
      variable_filter: strings; a parameter is standardized if its path ("Dense_0/kernel") contains
        one of them. None standardizes all parameters.
      epsilon_to: what epsilon is added to: "variance", or "deviation" as in the code of BiT and ViT
        (`StdConv` of big_vision).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from normjax.linen import WeightStandardization
      >>> norm = WeightStandardization(nn.Dense(2, use_bias=False))
      >>> weights, variables = norm.init_with_output(jax.random.key(0), jnp.eye(8))
      >>> print(abs(weights.mean(0)).round(3), weights.std(0).round(2))
      [0. 0.] [1. 1.]
    """

    layer_instance: nn.Module
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = False
    scale_init: Initializer = ones
    feature_axes: Axes | None = -1
    scaled: bool = False
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})
    epsilon_to: EpsilonTo = "variance"

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its weights standardized.

        Args:
          *args: passed to the layer.
          **kwargs: passed to the layer.

        Returns:
          What the layer returns.
        """
        normalized = partial(_standardized, self)
        return with_weights(self, normalized, *args, initialize_normalized=False, **kwargs)


def _standardized(module: WeightStandardization, path: str, kernel: jax.Array) -> jax.Array:
    if kernel.ndim < 2 or not chosen(module, path):
        return kernel
    kept, params = scales(module, path, kernel)
    kernel, dtype = promoted(module, kernel, *params.values())
    return weight_standardization(
        params,
        {},
        kernel,
        True,
        feature_axes=kept,
        scaled=module.scaled,
        epsilon=module.epsilon,
        epsilon_to=module.epsilon_to,
        dtype=dtype,
    )[0]
