"""Global response normalization for `flax.nnx`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Never

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
from jax.nn.initializers import zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer
from normjax.layers.affine import initial_scale
from normjax.layers.global_response_norm import global_response_norm
from normjax.nnx._shared import common, declare, present, promoted, read


class GlobalResponseNorm(nnx.Module):
    """Global response normalization, as in ConvNeXt V2.

    The variables (`scale`, `bias`: `nnx.Param`) are the leaves of `normjax.global_response_norm`,
    whose docstring has the equations. Both start at zero, so y starts equal to x.

    Args:
      num_features: size of the feature axis; with several feature axes, the product of their sizes.
      epsilon: added to the mean of the norms.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale. Without it, the scale is 1.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes of the channels, along which parameters vary. All other axes except
        axis 0 are reduced.
      axis_name: mapped axis over which the reduction axes are sharded. Norms are all-reduced over
        it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        norms. None means a single group.
      promote_dtype: function of `(x, scale, bias)` and `dtype` that returns the arrays promoted.
        Only the dtype of y follows from it.
      scale_offset: constant added to the stored scale, in float32 or wider. The default
        `scale_init` then stores `-scale_offset`.
      rngs: random keys for the initializers.
      metadata: metadata of the variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import GlobalResponseNorm
      >>> norm = GlobalResponseNorm(2, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[[3.0, 0.0], [4.0, 5.0]]])).ravel())
      [3. 0. 4. 5.]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = zeros,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        scale_offset: float = 0.0,
        rngs: nnx.Rngs,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        made = (num_features,), param_dtype, rngs, metadata
        declare(self, "scale", use_scale, initial_scale(scale_init, scale_offset, start=0), *made)
        declare(self, "bias", use_bias, bias_init, *made)
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.feature_axes = feature_axes
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.promote_dtype = promote_dtype
        self.scale_offset = scale_offset

    @with_foreign_names
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        **_foreign: Never,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, with examples along axis 0.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x.
        """
        if _foreign:
            raise_for_foreign(GlobalResponseNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        leaves = read(self, "scale", "bias")
        x, dtype = promoted(self, x, leaves)
        y, _ = global_response_norm(
            present(leaves, self, x, self.feature_axes),
            {},
            x,
            False,
            feature_axes=self.feature_axes,
            dtype=dtype,
            **common(self, mask),
        )
        return y
