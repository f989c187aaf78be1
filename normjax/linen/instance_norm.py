"""`flax.linen.InstanceNorm` with normjax behind it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from normjax import _checks
from normjax._typing import Axes
from normjax.layers.instance_norm import instance_norm
from normjax.linen._shared import common, declare, promoted, sizes


class InstanceNorm(nn.InstanceNorm):
    """Instance normalization: `flax.linen.InstanceNorm`, with a variance that is safe.

    Change the import and nothing else: constructor and call take the same arguments, and the
      variables have the same
    names (`params`: `scale`, `bias`), shapes and dtypes, so checkpoints load both ways. See
    `normjax.instance_norm` for the mathematics.

    Beyond Flax:
      - The variance is safe and the statistics are float32 (or wider) in every mode, so
        `use_fast_variance` chooses nothing, and `force_float32_reductions` only the dtype of the
        parameters.
      - Masked elements may be NaN; where nothing counts, the mean is 0 and the variance 1.
      - Axes out of range or repeated are refused, and no mapped axis has to exist at
        initialization.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import InstanceNorm
      >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
      >>> print(InstanceNorm().init_with_output(jax.random.key(0), x)[0].round(3))
      [[[-1. -1.]
        [ 1.  1.]]]
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, examples along axis 0.
          mask: broadcastable to x, True where an element counts.

        Returns:
          y, of x's shape; its dtype is `dtype`, or that of x, scale and bias together.
        """
        x = jnp.asarray(x)
        _examples_are_no_feature(self.feature_axes, x)
        params = declare(self, sizes(self, x), scale=self.use_scale, bias=self.use_bias)
        x, dtype = promoted(self, x, *params.values())
        y, _ = instance_norm(
            params, {}, x, False, feature_axes=self.feature_axes, dtype=dtype, **common(self, mask)
        )
        return y


def _examples_are_no_feature(feature_axes: Axes, x: jax.Array) -> None:
    if 0 in _checks.axes("InstanceNorm", "feature_axes", feature_axes, x.shape):
        _checks.raise_error(
            "InstanceNorm",  # in Flax's words
            "The channel axes cannot include the leading dimension as this is assumed to be the batch axis",
            expected="feature_axes without axis 0",
            got=f"feature_axes={feature_axes!r} for x.shape={x.shape}",
            fix="Move the examples to axis 0",
        )
