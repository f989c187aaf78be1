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

    Change the import and nothing else: constructor and call take the same arguments, and the
    variables have the same names (`params`: `scale`, `bias`), shapes and dtypes, so checkpoints
    load both ways. See `normjax.group_norm` for the mathematics.

    Beyond Flax:
      - The variance is safe and the statistics are float32 (or wider) in every mode.
        `use_fast_variance` has no effect; `force_float32_reductions` only sets the dtype of the
        parameters.
      - Masks need not have the size of the channels, and masked elements may be NaN. If nothing
        counts, the mean is 0 and the variance 1.
      - Axes out of range or repeated raise an error, and no mapped axis has to exist at
        initialization.

    Args:
      num_groups: number of groups, a divisor of the number of channels. None if `group_size` is
        given.
      group_size: number of channels in a group. It needs `num_groups=None`, since that is 32 by
        default.
      epsilon: added to the variance, which may be 0.
      dtype: dtype of y. None: the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes that mean and variance are taken over, the last among them. None: all
        but the first.
      axis_name: mapped axis that the reduced axes are sharded over: statistics are shared over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None: one group of all.
      use_fast_variance: accepted for compatibility, without effect.
      force_float32_reductions: whether scale and bias keep their dtype. False casts them to
        `param_dtype`, as Flax does; statistics are float32 or wider in both cases.
      scale_offset: added to the scale, in float32 or wider. 1.0 suits checkpoints that store `scale
        - 1`; the default of `scale_init` then makes zeros.
      cumulative_axis: axis that the statistics grow along, such as 1 for `(batch, time, channels)`:
        y at t depends on positions up to t alone. None: each statistic is over all positions.

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
          x: the input, channels along the last axis.
          mask: broadcastable to x: True where an element counts, or the weight of each.

        Returns:
          y, of x's shape; its dtype is `dtype`, or the one that x, scale and bias promote to.
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
            "the groups are to be given by their number or by their size",
            expected="one of num_groups and group_size, and None for the other",
            got=f"num_groups={norm.num_groups!r} and group_size={norm.group_size!r}",
            fix="Pass num_groups=None with group_size: it is 32 by default",
        )
