"""Filter response normalization for `flax.linen`."""

from __future__ import annotations

from typing import Never

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import ones, zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, AxisIndexGroups, AxisName, DTypeLike, Initializer
from normjax.layers.filter_response_norm import filter_response_norm, small
from normjax.linen._shared import common, declare, promoted, sizes


class FilterResponseNorm(nn.Module):
    """Filter response normalization and its thresholded linear unit.

    It replaces a normalization such as `flax.linen.InstanceNorm` and the activation after it. The
    variables (`params`: `scale`, `bias`, `threshold` and maybe `epsilon`) are the leaves of
    `normjax.filter_response_norm`, whose docstring has the equations.

    Args:
      epsilon: added to the mean square.
      dtype: dtype of y. None means the dtype that x and the parameters promote to.
      param_dtype: dtype of the parameters.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale.
      use_threshold: whether to use a learnable threshold, a lower bound of y.
      learn_epsilon: whether each feature also learns an epsilon. It is recommended for 1x1 feature
        maps.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      threshold_init: initializer of the threshold.
      epsilon_init: initializer of the learned epsilon.
      feature_axes: the axes along which statistics and parameters vary. All other axes except axis
        0 are reduced.
      axis_name: mapped axis over which the reduction axes are sharded. Statistics are all-reduced
        over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None means a single group.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import FilterResponseNorm
      >>> x = jnp.array([[[2.0], [-2.0]]])
      >>> print(FilterResponseNorm().init_with_output(jax.random.key(0), x)[0].round(3).ravel())
      [1. 0.]
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    use_threshold: bool = True
    learn_epsilon: bool = False
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    threshold_init: Initializer = zeros
    epsilon_init: Initializer = small
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
          y, with the shape of x. Its dtype is `dtype`, or the one that x and the parameters promote
          to.
        """
        if _foreign:
            raise_for_foreign(FilterResponseNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        params = declare(
            self,
            sizes(self, x),
            scale=self.use_scale,
            bias=self.use_bias,
            threshold=self.use_threshold,
            epsilon=self.learn_epsilon,
        )
        x, dtype = promoted(self, x, *params.values())
        y, _ = filter_response_norm(
            params, {}, x, False, feature_axes=self.feature_axes, dtype=dtype, **common(self, mask)
        )
        return y
