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
    """Weight normalization of the layer that it wraps: `flax.linen.WeightNorm` in float32.

    Change the import and nothing else: constructor and call take the same arguments, and the
    variables have the same names (`params`: `Dense_0/kernel/scale` and so on), shapes and dtypes,
    so checkpoints load both ways. See `normjax.weights.weight_norm` for the mathematics. As in
    Flax, the weights of the layer start with norm 1.

    Beyond Flax:
      - Norms and products are taken in float32 (or wider) and rounded once.
      - Only parameters are normalized, so running statistics of the layer are updated as usual.
        (Flax also normalizes them if the filter lets them pass, and cannot update them.)
      - Axes out of range or repeated raise an error.

    Args:
      layer_instance: the layer to wrap.
      epsilon: added to the squared norm.
      dtype: dtype of the weights in use. None: the dtype that weights and scales promote to.
      param_dtype: dtype of the scales.
      use_scale: whether the norms are learned. Otherwise they are 1.
      scale_init: initializer of the scales, which are the norms.
      feature_axes: the axes along which each slice of a weight has its own norm. None: one norm of
        the whole weight.
      variable_filter: strings; a parameter is normalized if its path ("Dense_0/kernel") contains
        one of them. None: all are.

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
