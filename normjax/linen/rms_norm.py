"""`flax.linen.RMSNorm`, computed by normjax."""

from __future__ import annotations

from typing import Never

import jax
from flax import linen as nn

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax.layers.rms_norm import rms_norm
from normjax.linen._shared import common, declare, promoted, sizes


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization: `flax.linen.RMSNorm`, rounded once.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`params`: `scale`), shapes and dtypes, so checkpoints can be exchanged in
    both directions. See `normjax.rms_norm` for the equations.

    Differences from Flax:
      - The mean square is in float32 or wider in every mode. `use_fast_variance` has no effect;
        `force_float32_reductions` only sets the dtype of the scale.
      - Masked elements may be NaN. If no element counts, the mean square is 1.
      - Axes that are repeated or out of range raise an error, and initialization works without the
        mapped axis.

    Args:
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
      force_float32_reductions: whether the scale keeps its dtype. With False, it is cast to
        `param_dtype`, as in Flax. The mean square is in float32 or wider in both cases.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import RMSNorm
      >>> y, variables = RMSNorm().init_with_output(jax.random.key(0), jnp.array([[1.0, 7.0]]))
      >>> print(y.round(1), variables["params"]["scale"])
      [[0.2 1.4]] [1. 1.]
    """

    scale_offset: float = 0.0

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
          x: the input.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x. Its dtype is `dtype`, or the one that x and the scale promote to.
        """
        if _foreign:
            raise_for_foreign(RMSNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        params = declare(self, sizes(self, x), scale=self.use_scale)
        x, dtype = promoted(self, x, *params.values())
        y, _ = rms_norm(
            params,
            {},
            x,
            False,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            dtype=dtype,
            **common(self, mask),
        )
        return y
