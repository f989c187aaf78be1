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

    Change the import and nothing else: constructor and call take the same arguments, and the
    variables have the same names (`params`: `scale`), shapes and dtypes, so checkpoints load both
    ways. See `normjax.rms_norm` for the mathematics.

    Beyond Flax:
      - The mean square is float32 (or wider) in every mode. `use_fast_variance` has no effect;
        `force_float32_reductions` only sets the dtype of the scale.
      - Masked elements may be NaN. If nothing counts, the mean square is 1.
      - Axes out of range or repeated raise an error, and no mapped axis has to exist at
        initialization.

    Args:
      epsilon: added to the mean square.
      dtype: dtype of y. None: the dtype that x and the scale promote to.
      param_dtype: dtype of the scale.
      use_scale: whether to use a learnable scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes that the mean square is taken over.
      feature_axes: the axes that the scale runs along.
      axis_name: mapped axis that the reduced axes are sharded over: statistics are shared over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None: one group of all.
      use_fast_variance: accepted for compatibility, without effect.
      force_float32_reductions: whether the scale keeps its dtype. False casts it to `param_dtype`,
        as Flax does; the mean square is float32 or wider in both cases.
      scale_offset: added to the scale, in float32 or wider. 1.0 suits checkpoints that store `scale
        - 1`; the default of `scale_init` then makes zeros.

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
          mask: broadcastable to x: True where an element counts, or the weight of each.

        Returns:
          y, of x's shape; its dtype is `dtype`, or the one that x and the scale promote to.
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
