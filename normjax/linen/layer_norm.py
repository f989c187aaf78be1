"""`flax.linen.LayerNorm`, computed by normjax."""

from __future__ import annotations

from typing import Never

import jax
from flax import linen as nn

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax.layers.layer_norm import layer_norm
from normjax.linen._shared import common, declare, promoted, sizes


class LayerNorm(nn.LayerNorm):
    """Layer normalization: `flax.linen.LayerNorm` with a safe variance.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`params`: `scale`, `bias`), shapes and dtypes, so checkpoints can be
    exchanged in both directions. See `normjax.layer_norm` for the equations.

    Differences from Flax:
      - The variance is safe (it does not suffer from cancellation), and statistics are in float32
        or wider in every mode. `use_fast_variance` has no effect; `force_float32_reductions` only
        sets the dtype of the parameters.
      - Masked elements may be NaN. If no element counts, the mean is 0 and the variance is 1.
      - Axes that are repeated or out of range raise an error, and initialization works without the
        mapped axis.

    Args:
      epsilon: added to the variance. It may be 0.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which the mean and variance are computed.
      feature_axes: the axes along which scale and bias vary.
      axis_name: mapped axis over which the reduction axes are sharded. Statistics are all-reduced
        over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None means a single group.
      use_fast_variance: has no effect; accepted for compatibility.
      force_float32_reductions: whether scale and bias keep their dtype. With False, they are cast
        to `param_dtype`, as in Flax. Statistics are in float32 or wider in both cases.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import LayerNorm
      >>> x = jnp.array([[1.0, 1.0, 3.0, 3.0]])
      >>> y, variables = LayerNorm().init_with_output(jax.random.key(0), x)
      >>> print(y.round(3), list(variables["params"]))
      [[-1. -1.  1.  1.]] ['scale', 'bias']
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
          y, with the shape of x. Its dtype is `dtype`, or the one that x, scale and bias promote
          to.
        """
        if _foreign:
            raise_for_foreign(LayerNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        params = declare(self, sizes(self, x), scale=self.use_scale, bias=self.use_bias)
        x, dtype = promoted(self, x, *params.values())
        y, _ = layer_norm(
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
