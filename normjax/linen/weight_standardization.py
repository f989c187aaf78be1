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
from normjax.linen._shared import promoted
from normjax.linen._weights import chosen, scales, with_weights
from normjax.weights import weight_standardization


class WeightStandardization(nn.Module):
    """Weight standardization of the layer that it wraps, in the manner of `flax.linen.WeightNorm`.

    Scales, where asked for, are variables as in `WeightNorm` (`params`: `Dense_0/kernel/scale` and
    the like). See `normjax.weights.weight_standardization` for the mathematics. Scalars and vectors
    stay as they are.

    Attributes:
      layer_instance: the layer.
      epsilon: added to the variance.
      dtype: of the weights in use; None for that of weights and scales together.
      param_dtype: of the scales.
      use_scale: whether there is a learned gain.
      scale_init: makes it.
      feature_axes: the axes whose weights have statistics of their own; None for one of all.
      scaled: whether the variance is 1 / fan-in instead of 1, for networks without normalization.
      variable_filter: normalize the parameters whose path ("Dense_0/kernel") has one of these in
        it; None for all.

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

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its weights standardized.

        Args:
          *args: of the layer.
          **kwargs: of the layer.

        Returns:
          What the layer returns.
        """
        return with_weights(self, partial(_standardized, self), *args, **kwargs)


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
        dtype=dtype,
    )[0]
