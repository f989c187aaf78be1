"""Dynamic tanh for `flax.linen`."""

from __future__ import annotations

from typing import Never

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import ones, zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, DTypeLike, Initializer
from normjax.layers.dynamic_tanh import dynamic_tanh, half
from normjax.linen._shared import declare, promoted, sizes


class DynamicTanh(nn.Module):
    """Dynamic tanh, which replaces `flax.linen.LayerNorm`.

    The variables (`params`: `alpha`, `scale`, `bias`) are the leaves of `normjax.dynamic_tanh`,
    whose docstring has the equations.

    Args:
      dtype: dtype of y. None means the dtype that x and the parameters promote to.
      param_dtype: dtype of the parameters.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      alpha_init: initializer of the slope alpha, a scalar. The default of 0.5 suits all models
        except large language models, which need smaller values.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes along which scale and bias vary.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import DynamicTanh
      >>> x = jnp.array([[1.0, -100.0]])
      >>> print(DynamicTanh().init_with_output(jax.random.key(0), x)[0].round(3))
      [[ 0.462 -1.   ]]
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    alpha_init: Initializer = half
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
        """Squashes x.

        Args:
          x: the input.

        Returns:
          y, with the shape of x. Its dtype is `dtype`, or the one that x and the parameters promote
          to.
        """
        if _foreign:
            raise_for_foreign(DynamicTanh.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        params = declare(self, (), alpha=True)
        params |= declare(self, sizes(self, x), scale=self.use_scale, bias=self.use_bias)
        x, dtype = promoted(self, x, *params.values())
        y, _ = dynamic_tanh(
            params,
            {},
            x,
            False,
            scale_offset=self.scale_offset,
            feature_axes=self.feature_axes,
            dtype=dtype,
        )
        return y
