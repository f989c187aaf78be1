"""`flax.nnx.RMSNorm`, computed by normjax."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Never

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
from jax.nn.initializers import ones

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, AxisIndexGroups, DTypeLike, Initializer
from normjax.layers.affine import initial_scale
from normjax.layers.rms_norm import rms_norm
from normjax.nnx._shared import common, present, promoted, read


class RMSNorm(nnx.RMSNorm):
    """Root mean square normalization: `flax.nnx.RMSNorm`, rounded once.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`scale`: `nnx.Param`), shapes and dtypes, so checkpoints can be exchanged
    in both directions. See `normjax.rms_norm` for the equations.

    Differences from Flax:
      - Input and scale keep their precision: `promote_dtype` and `dtype` only decide the dtype of
        y.
      - Masks may be integers or real weights, and masked elements may be NaN. If no element counts,
        the mean square is 1.
      - Axes that are repeated or out of range raise an error.

    Args:
      num_features: size of the feature axis; with several feature axes, the product of their sizes.
      epsilon: added to the mean square.
      dtype: dtype of y. None means the dtype that x and the scale promote to.
      param_dtype: dtype of the scale.
      use_scale: whether to use a learnable scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which the mean square is computed.
      feature_axes: the axes along which the scale varies.
      axis_name: mapped axis over which the reduction axes are sharded. Statistics are all-reduced
        over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None means a single group.
      use_fast_variance: has no effect; accepted for compatibility.
      promote_dtype: function of `(x, scale)` and `dtype` that returns the arrays promoted. Only the
        dtype of y follows from it.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      rngs: random keys for the initializers.
      scale_metadata: metadata of the scale variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import RMSNorm
      >>> print(RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 7.0]])).round(1))
      [[0.2 1.4]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        scale_offset: float = 0.0,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_scale=use_scale,
            scale_init=initial_scale(scale_init, scale_offset),
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            scale_metadata=scale_metadata,
        )
        self.scale_offset = scale_offset

    @with_foreign_names
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        **_foreign: Never,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x.
        """
        if _foreign:
            raise_for_foreign(RMSNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        leaves = read(self, "scale")
        x, dtype = promoted(self, x, leaves)
        y, _ = rms_norm(
            present(leaves, self, x, self.feature_axes),
            {},
            x,
            False,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            dtype=dtype,
            **common(self, mask),
        )
        return y
