"""`flax.linen.GroupNorm`, computed by normjax."""

from __future__ import annotations

from typing import Never

import jax
from flax import linen as nn

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax.layers.group_norm import group_norm
from normjax.linen._shared import common, declare, promoted


class GroupNorm(nn.GroupNorm):
    """Group normalization: `flax.linen.GroupNorm` with a safe variance.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`params`: `scale`, `bias`), shapes and dtypes, so checkpoints can be
    exchanged in both directions. See `normjax.group_norm` for the equations.

    Differences from Flax:
      - The variance is safe (it does not suffer from cancellation), and statistics are in float32
        or wider in every mode. `use_fast_variance` has no effect; `force_float32_reductions` only
        sets the dtype of the parameters.
      - Masks need not have the size of the channels, and masked elements may be NaN. If no element
        counts, the mean is 0 and the variance is 1.
      - Axes that are repeated or out of range raise an error, and initialization works without the
        mapped axis.

    Args:
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
      force_float32_reductions: whether scale and bias keep their dtype. With False, they are cast
        to `param_dtype`, as in Flax. Statistics are in float32 or wider in both cases.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      cumulative_axis: axis along which the statistics are cumulative, such as 1 for `(batch, time,
        channels)`: y at t depends only on positions up to t. None computes each statistic over all
        positions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import GroupNorm
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> print(GroupNorm(num_groups=2).init_with_output(jax.random.key(0), x)[0].round(3))
      [[-1.  1. -1.  1.]]
    """

    scale_offset: float = 0.0
    cumulative_axis: int | None = None

    @nn.compact
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
          y, with the shape of x. Its dtype is `dtype`, or the one that x, scale and bias promote
          to.
        """
        if _foreign:
            raise_for_foreign(GroupNorm.__call__, _foreign)
        _one_of_two(self)
        x = _checks.array(type(self).__name__, x)
        params = declare(self, x.shape[-1:], scale=self.use_scale, bias=self.use_bias)
        x, dtype = promoted(self, x, *params.values())
        y, _ = group_norm(
            params,
            {},
            x,
            False,
            num_groups=self.num_groups,
            group_size=self.group_size,
            reduction_axes=self.reduction_axes,
            cumulative_axis=self.cumulative_axis,
            dtype=dtype,
            **common(self, mask),
        )
        return y


def _one_of_two(norm: GroupNorm) -> None:
    if (norm.num_groups is None) == (norm.group_size is None):
        _checks.raise_error(
            "GroupNorm",
            "not exactly one of num_groups and group_size is given",
            expected="a value for one of num_groups and group_size, and None for the other",
            got=f"num_groups={norm.num_groups!r} and group_size={norm.group_size!r}",
            fix="Pass num_groups=None with group_size; its default is 32",
        )
