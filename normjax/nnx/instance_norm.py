"""`flax.nnx.InstanceNorm`, computed by normjax."""

from __future__ import annotations

from typing import Never

import jax
from flax import nnx

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes
from normjax.layers.instance_norm import instance_norm
from normjax.nnx._shared import common, present, promoted, read


class InstanceNorm(nnx.InstanceNorm):
    """Instance normalization: `flax.nnx.InstanceNorm` with a safe variance.

    Change the import and nothing else: constructor and call take the same arguments, and the
    variables have the same names (`scale`, `bias`: `nnx.Param`), shapes and dtypes, so checkpoints
    load both ways. See `normjax.instance_norm` for the mathematics.

    Beyond Flax:
      - The variance is safe; `use_fast_variance` has no effect.
      - Input and parameters keep their precision: `promote_dtype` and `dtype` only decide the dtype
        of y.
      - Masks may be integers or real weights, and masked elements may be NaN. If nothing counts,
        the mean is 0 and the variance 1.
      - Axes out of range or repeated raise an error.

    Args:
      num_features: size of the feature axis; with several feature axes, the product of their sizes.
      epsilon: added to the variance, which may be 0.
      dtype: dtype of y. None: the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes that statistics, scale and bias run along. All other axes but axis 0
        are reduced.
      axis_name: mapped axis that the reduced axes are sharded over: statistics are shared over it.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None: one group of all.
      use_fast_variance: accepted for compatibility, without effect.
      promote_dtype: function of `(x, scale, bias)` and `dtype` that returns the arrays promoted.
        Only the dtype of y follows from it.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias variable.
      scale_metadata: metadata of the scale variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import InstanceNorm
      >>> norm = InstanceNorm(2, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(3))
      [[[-1. -1.]
        [ 1.  1.]]]
    """

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
          x: the input, examples along axis 0.
          mask: broadcastable to x: True where an element counts, or the weight of each.

        Returns:
          y, of x's shape.
        """
        if _foreign:
            raise_for_foreign(InstanceNorm.__call__, _foreign)
        x = _checks.array(type(self).__name__, x)
        _examples_are_no_feature(self.feature_axes, x)
        leaves = read(self, "scale", "bias")
        x, dtype = promoted(self, x, leaves)
        params = present(leaves, self, x, self.feature_axes)
        y, _ = instance_norm(
            params, {}, x, False, feature_axes=self.feature_axes, dtype=dtype, **common(self, mask)
        )
        return y


def _examples_are_no_feature(feature_axes: Axes, x: jax.Array) -> None:
    if 0 in _checks.axes("InstanceNorm", "feature_axes", feature_axes, x.shape):
        _checks.raise_error(
            "InstanceNorm",  # in Flax's words
            "The channel axes cannot include the leading dimension as this is assumed to be the "
            "batch axis",
            expected="feature_axes without axis 0",
            got=f"feature_axes={feature_axes!r} for x.shape={x.shape}",
            fix="Move the examples to axis 0",
        )
