"""`flax.linen.WeightNorm`, computed by normjax."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import linen as nn

from normjax.linen._shared import promoted
from normjax.linen._weights import chosen, scales, with_weights
from normjax.weights import weight_norm


class WeightNorm(nn.WeightNorm):
    """Wraps a layer with weight normalization: `flax.linen.WeightNorm` in float32.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`params`: `Dense_0/kernel/scale` and so on), shapes and dtypes, so
    checkpoints can be exchanged in both directions. See `normjax.weights.weight_norm` for the
    equations. As in Flax, the weights of the layer start with norm 1.

    Differences from Flax:
      - Norms and products are computed in float32 or wider, and rounded once.
      - Only parameters are normalized, so running statistics of the layer are updated as usual.
        (Flax also normalizes running statistics that the filter selects, and then cannot update
        them.)
      - Axes that are repeated or out of range raise an error.

    Args:
      layer_instance: the layer to wrap.
      epsilon: added to the squared norm.
      dtype: dtype of the normalized weights. None means the dtype that weights and scales promote
        to.
      param_dtype: dtype of the scales.
      use_scale: whether the norms are learnable. Otherwise they are 1.
      scale_init: initializer of the scales, which are the norms.
      feature_axes: the axes along which each slice of a weight has its own norm. None means one
        norm for the whole weight.
      variable_filter: strings; a parameter is normalized if its path ("Dense_0/kernel") contains
        one of them. None normalizes all parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from normjax.linen import WeightNorm
      >>> norm = WeightNorm(nn.Dense(2))
      >>> variables = norm.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> print(variables["params"]["layer_instance/kernel/scale"])
      [1. 1.]
      >>> weights = norm.apply(variables, jnp.eye(3))  # the bias is 0
      >>> print((weights**2).sum(0).round(3))
      [1. 1.]
    """

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its weights normalized.

        Args:
          *args: passed to the layer.
          **kwargs: passed to the layer.

        Returns:
          What the layer returns.
        """
        return with_weights(self, partial(_weight_normed, self), *args, **kwargs)


def _weight_normed(module: WeightNorm, path: str, kernel: jax.Array) -> jax.Array:
    if not chosen(module, path):
        return kernel
    kept, params = scales(module, path, kernel)
    kernel, dtype = promoted(module, kernel, *params.values())
    return weight_norm(
        params, {}, kernel, False, feature_axes=kept, epsilon=module.epsilon, dtype=dtype
    )[0]
