"""Dynamic tanh for `flax.nnx`."""

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
from normjax.layers.dynamic_tanh import dynamic_tanh, half
from normjax.nnx._shared import declare, present, promoted, read


class DynamicTanh(nnx.Module):
    """Dynamic tanh, which replaces `flax.nnx.LayerNorm`.

    The variables (`alpha`, `scale`, `bias`: `nnx.Param`) are the leaves of `normjax.dynamic_tanh`,
    whose docstring has the equations.

    Args:
      num_features: size of the feature axis; with several feature axes, the product of their sizes.
      dtype: dtype of y. None means the dtype that x and the parameters promote to.
      param_dtype: dtype of the parameters.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      alpha_init: initializer of the slope alpha, a scalar. The default of 0.5 suits all models
        except large language models, which need smaller values.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes along which scale and bias vary.
      promote_dtype: function of `(x, alpha, scale, bias)` and `dtype` that returns the arrays
        promoted. Only the dtype of y follows from it.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias variable.
      scale_metadata: metadata of the scale variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import DynamicTanh
      >>> print(DynamicTanh(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, -100.0]])).round(3))
      [[ 0.462 -1.   ]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        alpha_init: Initializer = half,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        scale_offset: float = 0.0,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        declare(self, "alpha", True, alpha_init, (), param_dtype, rngs, {})
        starting = initial_scale(scale_init, scale_offset)
        declare(
            self, "scale", use_scale, starting, (num_features,), param_dtype, rngs, scale_metadata
        )
        declare(
            self, "bias", use_bias, bias_init, (num_features,), param_dtype, rngs, bias_metadata
        )
        self.num_features = num_features
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
        """Squashes x.

        Args:
          x: the input.

        Returns:
          y, with the shape of x.
        """
        if _foreign:
            raise_for_foreign(DynamicTanh.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        leaves = read(self, "alpha", "scale", "bias")
        x, dtype = promoted(self, x, leaves)
        params = present(leaves, self, x, self.feature_axes)
        y, _ = dynamic_tanh(
            params,
            {},
            x,
            False,
            scale_offset=self.scale_offset,
            feature_axes=self.feature_axes,
            dtype=dtype,
        )
        return y
