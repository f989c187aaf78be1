"""Local response normalization for `flax.linen`."""

from __future__ import annotations

from typing import Never

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import ones, zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, DTypeLike, Initializer
from normjax.layers.local_response_norm import local_response_norm
from normjax.linen._shared import declare, promoted, sizes


class LocalResponseNorm(nn.Module):
    """Local response normalization, with the arguments of Flax's layers.

    See `normjax.local_response_norm` for the equations. By default there are no variables;
    `use_scale` and `use_bias` add them.

    Args:
      size: number of neighbouring channels in the mean, including the channel itself.
      alpha: factor of the mean square, as in PyTorch. In the paper and TensorFlow, alpha is the
        factor of the sum, that is `alpha / size` here.
      beta: exponent of the divisor.
      k: added to alpha times the mean square; must be positive.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axis of the channels.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import LocalResponseNorm
      >>> norm = LocalResponseNorm(size=3, alpha=3.0, beta=1.0, k=1.0)
      >>> print(norm.apply({}, jnp.array([[1.0, 2.0, 3.0]])))
      [[0.16666667 0.13333334 0.21428573]]
    """

    size: int = 5
    alpha: float = 5e-4
    beta: float = 0.75
    k: float = 2.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = False
    use_scale: bool = False
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    feature_axes: Axes = -1
    scale_offset: float = 0.0

    @nn.compact
    @with_foreign_names
    def __call__(
        self,
        x: jax.Array,
        **_foreign: Never,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, with channels along `feature_axes`.

        Returns:
          y, with the shape of x. Its dtype is `dtype`, or the one that x, scale and bias promote
          to.
        """
        if _foreign:
            raise_for_foreign(LocalResponseNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        params = declare(self, sizes(self, x), scale=self.use_scale, bias=self.use_bias)
        x, dtype = promoted(self, x, *params.values())
        y, _ = local_response_norm(
            params,
            {},
            x,
            False,
            size=self.size,
            alpha=self.alpha,
            beta=self.beta,
            k=self.k,
            scale_offset=self.scale_offset,
            feature_axes=self.feature_axes,
            dtype=dtype,
        )
        return y
