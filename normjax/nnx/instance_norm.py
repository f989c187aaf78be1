"""`flax.nnx.InstanceNorm`, computed by normjax."""

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
from normjax._typing import Axes, AxisIndexGroups, DTypeLike, Initializer
from normjax.layers.affine import initial_scale
from normjax.layers.instance_norm import instance_norm
from normjax.nnx._shared import common, present, promoted, read


class InstanceNorm(nnx.InstanceNorm):
    """Instance normalization: `flax.nnx.InstanceNorm` with a safe variance.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`scale`, `bias`: `nnx.Param`), shapes and dtypes, so checkpoints can be
    exchanged in both directions. See `normjax.instance_norm` for the equations.

    Differences from Flax:
      - The variance is safe (it does not suffer from cancellation); `use_fast_variance` has no
        effect.
      - Input and parameters keep their precision: `promote_dtype` and `dtype` only decide the dtype
        of y.
      - Masks may be integers or real weights, and masked elements may be NaN. If no element counts,
        the mean is 0 and the variance is 1.
      - Axes that are repeated or out of range raise an error.

    Args:
      num_features: size of the feature axis; with several feature axes, the product of their sizes.
      epsilon: added to the variance. It may be 0.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes along which statistics, scale and bias vary. All other axes except axis
        0 are reduced.
      axis_name: mapped axis over which the reduction axes are sharded. Statistics are all-reduced
        over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None means a single group.
      use_fast_variance: has no effect; accepted for compatibility.
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
      >>> from normjax.nnx import InstanceNorm
      >>> norm = InstanceNorm(2, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(3))
      [[[-1. -1.]
        [ 1.  1.]]]
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
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        scale_offset: float = 0.0,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=initial_scale(scale_init, scale_offset),
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
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
            raise_for_foreign(InstanceNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        _examples_are_no_feature(self.feature_axes, x)
        leaves = read(self, "scale", "bias")
        x, dtype = promoted(self, x, leaves)
        params = present(leaves, self, x, self.feature_axes)
        y, _ = instance_norm(
            params, {}, x, False, feature_axes=self.feature_axes, dtype=dtype, **common(self, mask)
        )
        return y


def _examples_are_no_feature(feature_axes: Axes, x: jax.Array) -> None:
    if 0 in _checks.axes("InstanceNorm", "feature_axes", feature_axes, x.shape):
        _checks.raise_error(
            "InstanceNorm",  # the wording of Flax's error
            "The channel axes cannot include the leading dimension as this is assumed to be the "
            "batch axis",
            expected="feature_axes without axis 0",
            got=f"feature_axes={feature_axes!r} for x.shape={x.shape}",
            fix="Move the examples to axis 0",
        )
