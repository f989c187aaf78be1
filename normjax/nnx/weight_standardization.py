"""Weight standardization for `flax.nnx`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import ones

from normjax._typing import Axes, DTypeLike, Initializer
from normjax.nnx._weights import KERNEL, Path, features, scaled, with_weights
from normjax.weights import weight_standardization


class WeightStandardization(nnx.Module):
    """Weight standardization of the layer that it wraps, in the manner of `normjax.nnx.WeightNorm`.

    See `normjax.weights.weight_standardization` for the mathematics. The weights of the layer are
    never overwritten; scalars and vectors among them stay as they are in use, too.

    Args:
      layer_instance: the layer.
      feature_axes: the axes whose weights have statistics of their own; None for one of all.
      scaled: whether the variance is 1 / fan-in instead of 1, for networks without normalization.
      use_scale: whether there is a learned gain (`scales`: `nnx.Param`).
      scale_init: makes it.
      epsilon: added to the variance.
      dtype: of the weights in use; None for that of weights and scales together.
      param_dtype: of the scales.
      variable_filter: which parameters to standardize.
      rngs: keys for the initializer.

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
        rngs: nnx.Rngs,
    ):
        self.layer_instance = layer_instance
        self.feature_axes = () if feature_axes is None else feature_axes
        self.scaled = scaled
        self.use_scale = use_scale
        self.epsilon = epsilon
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
          x: of the layer.
          *args: of the layer.
          **kwargs: of the layer.

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
        dtype=dtype,
    )[0]
