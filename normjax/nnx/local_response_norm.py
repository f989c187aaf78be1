"""Local response normalization for `flax.nnx`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Never

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
from jax.nn.initializers import ones, zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, DTypeLike, Initializer
from normjax.layers.affine import initial_scale
from normjax.layers.local_response_norm import local_response_norm
from normjax.nnx._shared import declare, present, promoted, read


class LocalResponseNorm(nnx.Module):
    """Local response normalization, with the arguments of Flax's layers.

    See `normjax.local_response_norm` for the equations. By default there are no variables;
    `use_scale` and `use_bias` add them.

    Args:
      num_features: number of channels.
      size: number of neighbouring channels in the mean, including the channel itself.
      alpha: factor of the mean square, as in PyTorch. In the paper and TensorFlow, alpha is the
        factor of the sum, that is `alpha / size` here.
      beta: exponent of the divisor.
      k: added to alpha times the mean square; must be positive.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axis of the channels.
      promote_dtype: function of `(x, scale, bias)` and `dtype` that returns the arrays promoted.
        Only the dtype of y follows from it.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias variable.
      scale_metadata: metadata of the scale variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import LocalResponseNorm
      >>> norm = LocalResponseNorm(3, size=3, alpha=3.0, beta=1.0, k=1.0, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[1.0, 2.0, 3.0]])))
      [[0.16666667 0.13333334 0.21428573]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        size: int = 5,
        alpha: float = 5e-4,
        beta: float = 0.75,
        k: float = 2.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = False,
        use_scale: bool = False,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        scale_offset: float = 0.0,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        starting = initial_scale(scale_init, scale_offset)
        declare(
            self, "scale", use_scale, starting, (num_features,), param_dtype, rngs, scale_metadata
        )
        declare(
            self, "bias", use_bias, bias_init, (num_features,), param_dtype, rngs, bias_metadata
        )
        self.num_features = num_features
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.feature_axes = feature_axes
        self.promote_dtype = promote_dtype
        self.scale_offset = scale_offset

    @with_foreign_names
    def __call__(
        self,
        x: jax.Array,
        **_foreign: Never,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, with channels along `feature_axes`.

        Returns:
          y, with the shape of x.
        """
        if _foreign:
            raise_for_foreign(LocalResponseNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        leaves = read(self, "scale", "bias")
        x, dtype = promoted(self, x, leaves)
        y, _ = local_response_norm(
            present(leaves, self, x, self.feature_axes),
            {},
            x,
            False,
            size=self.size,
            alpha=self.alpha,
            beta=self.beta,
            k=self.k,
            scale_offset=self.scale_offset,
            feature_axes=self.feature_axes,
            dtype=dtype,
        )
        return y
