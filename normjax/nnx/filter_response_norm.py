"""Filter response normalization for `flax.nnx`."""

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
from normjax._typing import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer
from normjax.layers.affine import initial_scale
from normjax.layers.filter_response_norm import filter_response_norm, small
from normjax.nnx._shared import common, declare, present, promoted, read

LEAVES = ("scale", "bias", "threshold", "epsilon")


class FilterResponseNorm(nnx.Module):
    """Filter response normalization and its thresholded linear unit.

    It replaces a normalization such as `flax.nnx.InstanceNorm` and the activation after it. The
    variables (`scale`, `bias`, `threshold` and maybe `epsilon`: `nnx.Param`) are the leaves of
    `normjax.filter_response_norm`, whose docstring has the equations.

    Args:
      num_features: size of the feature axis; with several feature axes, the product of their sizes.
      epsilon: added to the mean square; kept in the attribute `fixed_epsilon`.
      dtype: dtype of y. None means the dtype that x and the parameters promote to.
      param_dtype: dtype of the parameters.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      use_threshold: whether to use a learnable threshold, a lower bound of y.
      learn_epsilon: whether each feature also learns an epsilon. It is recommended for 1x1 feature
        maps.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      threshold_init: initializer of the threshold.
      epsilon_init: initializer of the learned epsilon.
      feature_axes: the axes along which statistics and parameters vary. All other axes except axis
        0 are reduced.
      axis_name: mapped axis over which the reduction axes are sharded. Statistics are all-reduced
        over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None means a single group.
      promote_dtype: function of `(x, scale, bias, threshold, epsilon)` and `dtype` that returns the
        arrays promoted. Only the dtype of y follows from it.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      rngs: random keys for the initializers.
      metadata: metadata of the variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import FilterResponseNorm
      >>> norm = FilterResponseNorm(1, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[[2.0], [-2.0]]])).round(3).ravel())
      [1. 0.]
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
        use_threshold: bool = True,
        learn_epsilon: bool = False,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        threshold_init: Initializer = zeros,
        epsilon_init: Initializer = small,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        scale_offset: float = 0.0,
        rngs: nnx.Rngs,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        used = (use_scale, use_bias, use_threshold, learn_epsilon)
        inits = (initial_scale(scale_init, scale_offset), bias_init, threshold_init, epsilon_init)
        for leaf, is_used, init in zip(LEAVES, used, inits, strict=True):
            declare(self, leaf, is_used, init, (num_features,), param_dtype, rngs, metadata)
        self.num_features = num_features
        self.fixed_epsilon = epsilon
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
            raise_for_foreign(FilterResponseNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        leaves = read(self, *LEAVES)
        x, dtype = promoted(self, x, leaves)
        arguments: dict[str, Any] = common(self, mask) | {"epsilon": self.fixed_epsilon}
        params = present(leaves, self, x, self.feature_axes)
        return filter_response_norm(
            params, {}, x, False, feature_axes=self.feature_axes, dtype=dtype, **arguments
        )[0]
