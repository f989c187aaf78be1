"""Global response normalization for `flax.linen`."""

from __future__ import annotations

from typing import Never

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer
from normjax.layers.affine import initial_scale
from normjax.layers.global_response_norm import global_response_norm
from normjax.linen._shared import common, declare, promoted, sizes


class GlobalResponseNorm(nn.Module):
    """Global response normalization, as in ConvNeXt V2.

    The variables (`params`: `scale`, `bias`) are the leaves of `normjax.global_response_norm`,
    whose docstring has the equations. Both start at zero, so y starts equal to x.

    Args:
      epsilon: added to the mean of the norms.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale. Without it, the scale is 1.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes of the channels, along which parameters vary. All other axes except
        axis 0 are reduced.
      axis_name: mapped axis over which the reduction axes are sharded. Norms are all-reduced over
        it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        norms. None means a single group.
      scale_offset: constant added to the stored scale, in float32 or wider. The default
        `scale_init` then stores `-scale_offset`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import GlobalResponseNorm
      >>> x = jnp.array([[[3.0, 0.0], [4.0, 5.0]]])
      >>> print(GlobalResponseNorm().init_with_output(jax.random.key(0), x)[0].ravel())
      [3. 0. 4. 5.]
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = zeros
    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
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
          x: the input, with examples along axis 0.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x. Its dtype is `dtype`, or the one that x, scale and bias promote
          to.
        """
        if _foreign:
            raise_for_foreign(GlobalResponseNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        scale_init = initial_scale(self.scale_init, self.scale_offset, start=0)
        params = declare(self, sizes(self, x), scale_init, scale=self.use_scale, bias=self.use_bias)
        x, dtype = promoted(self, x, *params.values())
        y, _ = global_response_norm(
            params, {}, x, False, feature_axes=self.feature_axes, dtype=dtype, **common(self, mask)
        )
        return y
