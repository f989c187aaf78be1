"""`flax.nnx.GroupNorm`, computed by normjax."""

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
from normjax.layers.group_norm import group_norm
from normjax.nnx._shared import common, present, promoted, read


class GroupNorm(nnx.GroupNorm):
    """Group normalization: `flax.nnx.GroupNorm` with a safe variance.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`scale`, `bias`: `nnx.Param`), shapes and dtypes, so checkpoints can be
    exchanged in both directions. See `normjax.group_norm` for the equations.

    Differences from Flax:
      - The variance is safe (it does not suffer from cancellation); `use_fast_variance` has no
        effect.
      - Input and parameters keep their precision: `promote_dtype` and `dtype` only decide the dtype
        of y.
      - Each group is normalized by its own statistics, whatever `reduction_axes` are. (`flax.nnx`
        repeats the statistics along axis 1, which assigns channels to wrong groups if
        `reduction_axes` leaves out more than one axis.)
      - Masks may be integers or real weights, and need not have the size of the channels. Masked
        elements may be NaN. If no element counts, the mean is 0 and the variance is 1.
      - Axes that are repeated or out of range raise an error.

    Args:
      num_features: number of channels, the size of the last axis.
      num_groups: number of groups, a divisor of the number of channels. Pass None if you pass
        `group_size`.
      group_size: number of channels in a group. It requires `num_groups=None`, since the default of
        `num_groups` is 32.
      epsilon: added to the variance. It may be 0.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which the mean and variance are computed. They must include the
        last axis. None means all but the first.
      axis_name: mapped axis over which the reduction axes are sharded. Statistics are all-reduced
        over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None means a single group.
      use_fast_variance: has no effect; accepted for compatibility.
      promote_dtype: function of `(x, scale, bias)` and `dtype` that returns the arrays promoted.
        Only the dtype of y follows from it.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      cumulative_axis: axis along which the statistics are cumulative, such as 1 for `(batch, time,
        channels)`: y at t depends only on positions up to t. None computes each statistic over all
        positions.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias variable.
      scale_metadata: metadata of the scale variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import GroupNorm
      >>> norm = GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3))
      [[-1.  1. -1.  1.]]
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        scale_offset: float = 0.0,
        cumulative_axis: int | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            num_features,
            num_groups,
            group_size,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=initial_scale(scale_init, scale_offset),
            reduction_axes=reduction_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.scale_offset = scale_offset
        self.cumulative_axis = cumulative_axis

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
          x: the input, with channels along the last axis.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x.
        """
        if _foreign:
            raise_for_foreign(GroupNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        leaves = read(self, "scale", "bias")
        x, dtype = promoted(self, x, leaves)
        y, _ = group_norm(
            present(leaves, self, x),
            {},
            x,
            False,
            num_groups=self.num_groups,
            reduction_axes=self.reduction_axes,
            cumulative_axis=self.cumulative_axis,
            dtype=dtype,
            **common(self, mask),
        )
        return y
