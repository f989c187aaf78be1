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
    """Weight normalization of the layer that it wraps: `flax.nnx.WeightNorm` in float32.

    Change the import and nothing else: constructor and call take the same arguments, and the
    variables have the same names, shapes and dtypes, so checkpoints load both ways. See
    `normjax.weights.weight_norm` for the mathematics.

    Beyond Flax:
      - The weights of the layer are never overwritten (google/flax#5576): the unnormalized weights
        are trained, and a call under a transformation of JAX may close over the module. The call
        goes to a copy of the layer that shares all other variables; what it adds to the layer, as
        `sow` does outside `nnx.capture`, is lost.
      - The scales are `nnx.Param`, so that they are trained (google/flax#5577); before
        Flax 0.12.12 they are plain arrays there.
      - Norms and products are taken in float32 (or wider) and rounded once.
      - Axes out of range or repeated raise an error.

    Args:
      layer_instance: the layer to wrap.
      feature_axes: the axes along which each slice of a weight has its own norm. None: one norm of
        the whole weight.
      use_scale: whether the norms are learned. Otherwise they are 1.
      scale_init: initializer of the scales, which are float32.
      epsilon: added to the squared norm.
      dtype: dtype of the weights in use. None: the dtype that weights and scales promote to.
      param_dtype: accepted for compatibility, without effect.
      variable_filter: which parameters to normalize, as a filter of `nnx.state`.
      promote_dtype: accepted for compatibility, without effect.
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
            # Flax made them plain arrays before 0.12.12.
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
