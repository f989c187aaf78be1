"""`flax.linen.RMSNorm` with normjax behind it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from normjax.layers.rms_norm import rms_norm
from normjax.linen._shared import common, declare, promoted, sizes


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization: `flax.linen.RMSNorm`, rounded once.

    Change the import and nothing else: constructor and call take the same arguments, and the
      variables have the same
    names (`params`: `scale`), shapes and dtypes, so checkpoints load both ways. See
    `normjax.rms_norm` for the mathematics.

    Beyond Flax:
      - The mean square is float32 (or wider) in every mode, so `use_fast_variance` chooses nothing,
        and `force_float32_reductions` only the dtype of the scale.
      - Masked elements may be NaN; where nothing counts, the mean square is 1.
      - Axes out of range or repeated are refused, and no mapped axis has to exist at
        initialization.

    Attributes:
      scale_offset: added to the scale, in float32 or wider: 1.0 for checkpoints that store `scale -
        1` (Gemma), with `scale_init=zeros`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import RMSNorm
      >>> y, variables = RMSNorm().init_with_output(jax.random.key(0), jnp.array([[1.0, 7.0]]))
      >>> print(y.round(1), variables["params"]["scale"])
      [[0.2 1.4]] [1. 1.]
    """

    scale_offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input.
          mask: broadcastable to x, True where an element counts.

        Returns:
          y, of x's shape; its dtype is `dtype`, or that of x and the scale together.
        """
        x = jnp.asarray(x)
        params = declare(self, sizes(self, x), scale=self.use_scale)
        x, dtype = promoted(self, x, *params.values())
        y, _ = rms_norm(
            params,
            {},
            x,
            False,
            scale_offset=self.scale_offset,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            dtype=dtype,
            **common(self, mask),
        )
        return y
