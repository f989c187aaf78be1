"""Weight standardization for `flax.nnx`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import ones

from normjax._typing import Axes, DTypeLike, Initializer
from normjax.layers.standardize import EpsilonTo
from normjax.nnx._weights import KERNEL, Path, features, scaled, with_weights
from normjax.weights import weight_standardization


class WeightStandardization(nnx.Module):
    """Wraps a layer with weight standardization.

    It is used like `normjax.nnx.WeightNorm`. See `normjax.weights.weight_standardization` for the
    equations. The weights of the layer are never overwritten. Scalars and vectors are not
    standardized.

    Args:
      layer_instance: the layer to wrap.
      feature_axes: the axes along which each slice of a weight has its own statistics. None means
        one mean and variance for the whole weight.
      scaled: whether the variance is `1 / fan_in` instead of 1, for networks without activation
        normalization.
      use_scale: whether to use a learnable gain (`scales`: `nnx.Param`).
      scale_init: initializer of the gain.
      epsilon: added to the variance, or to the standard deviation; see `epsilon_to`.
      dtype: dtype of the normalized weights. None means the dtype that weights and scales promote
        to.
      param_dtype: dtype of the scales.
      variable_filter: which parameters to standardize, as a filter of `nnx.state`.
      epsilon_to: what epsilon is added to: "variance", or "deviation" as in the code of BiT and ViT
        (`StdConv` of big_vision).
      rngs: random keys for the initializer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import WeightStandardization
      >>> norm = WeightStandardization(nnx.Linear(8, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
      >>> weights = norm(jnp.eye(8))  # the bias is 0
      >>> print(abs(weights.mean(0)).round(3), weights.std(0).round(2))
      [0. 0.] [1. 1.]
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes | None = -1,
        scaled: bool = False,
        use_scale: bool = False,
        scale_init: Initializer = ones,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: nnx.filterlib.Filter = KERNEL,
        epsilon_to: EpsilonTo = "variance",
        rngs: nnx.Rngs,
    ):
        self.layer_instance = layer_instance
        self.feature_axes = () if feature_axes is None else feature_axes
        self.scaled = scaled
        self.use_scale = use_scale
        self.epsilon = epsilon
        self.epsilon_to: EpsilonTo = epsilon_to
        self.dtype = dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.scales = nnx.data(None)
        if use_scale:
            shapes = {
                path: features(self, weight[...])[1]
                for path, weight in nnx.to_flat_state(nnx.state(layer_instance, nnx.Param))
                if weight.ndim > 1 and self.variable_filter(path, weight)
            }
            self.scales = nnx.data(
                {
                    path: nnx.Param(scale_init(rngs.params(), shape, param_dtype))
                    for path, shape in shapes.items()
                }
            )

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its weights standardized.

        Args:
          x: the layer's input.
          *args: passed to the layer.
          **kwargs: passed to the layer.

        Returns:
          What the layer returns.
        """
        return with_weights(self.layer_instance, partial(_standardized, self), x, *args, **kwargs)


def _standardized(norm: WeightStandardization, path: Path, weight: nnx.Param) -> jax.Array | None:
    if weight.ndim < 2 or not norm.variable_filter(path, weight):
        return None
    params, kernel, dtype = scaled(norm, path, weight[...])
    kept, _ = features(norm, kernel)
    return weight_standardization(
        params,
        {},
        kernel,
        True,
        feature_axes=kept,
        scaled=norm.scaled,
        epsilon=norm.epsilon,
        epsilon_to=norm.epsilon_to,
        dtype=dtype,
    )[0]
