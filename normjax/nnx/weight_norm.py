"""`flax.nnx.WeightNorm`, computed by normjax."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
from jax.nn.initializers import ones

from normjax._typing import Axes, DTypeLike, Initializer
from normjax.nnx._weights import KERNEL, Path, features, scaled, with_weights
from normjax.weights import weight_norm


class WeightNorm(nnx.WeightNorm):
    """Wraps a layer with weight normalization: `flax.nnx.WeightNorm` in float32.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names, shapes and dtypes, so checkpoints can be exchanged in both directions. See
    `normjax.weights.weight_norm` for the equations.

    Differences from Flax:
      - The weights of the layer are never overwritten (google/flax#5576): the unnormalized weights
        are trained, and a call under a transformation of JAX may close over the module. The call
        goes to a copy of the layer, which shares all other variables. Attributes that the call adds
        to the layer, as `sow` does outside `nnx.capture`, are lost.
      - The scales are `nnx.Param`, so they are trained (google/flax#5577). In Flax before 0.12.12,
        they are plain arrays.
      - Norms and products are computed in float32 or wider, and rounded once.
      - Axes that are repeated or out of range raise an error.

    Args:
      layer_instance: the layer to wrap.
      feature_axes: the axes along which each slice of a weight has its own norm. None means one
        norm for the whole weight.
      use_scale: whether the norms are learnable. Otherwise they are 1.
      scale_init: initializer of the scales, which are float32.
      epsilon: added to the squared norm.
      dtype: dtype of the normalized weights. None means the dtype that weights and scales promote
        to.
      param_dtype: has no effect; accepted for compatibility.
      variable_filter: which parameters to normalize, as a filter of `nnx.state`.
      promote_dtype: has no effect; accepted for compatibility.
      rngs: random keys for the initializer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import WeightNorm
      >>> norm = WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
      >>> before, weights = norm.layer_instance.kernel[...], norm(jnp.eye(3))  # the bias is 0
      >>> print((weights**2).sum(0).round(3), (norm.layer_instance.kernel[...] == before).all())
      [1. 1.] True
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: nnx.filterlib.Filter = KERNEL,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            layer_instance,
            feature_axes=feature_axes,
            use_scale=use_scale,
            scale_init=scale_init,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            variable_filter=variable_filter,
            promote_dtype=promote_dtype,
            rngs=rngs,
        )
        if self.scales is not None:
            # Before 0.12.12, Flax stored them as plain arrays.
            scales = {path: nnx.Param(jnp.asarray(scale)) for path, scale in self.scales.items()}
            self.scales = nnx.data(scales)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its weights normalized.

        Args:
          x: the layer's input.
          *args: passed to the layer.
          **kwargs: passed to the layer.

        Returns:
          What the layer returns.
        """
        return with_weights(self.layer_instance, partial(_weight_normed, self), x, *args, **kwargs)


def _weight_normed(norm: WeightNorm, path: Path, weight: nnx.Param) -> jax.Array | None:
    if not norm.variable_filter(path, weight):
        return None
    params, kernel, dtype = scaled(norm, path, weight[...])
    kept, _ = features(norm, kernel)
    return weight_norm(
        params, {}, kernel, False, feature_axes=kept, epsilon=norm.epsilon, dtype=dtype
    )[0]
