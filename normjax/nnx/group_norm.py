"""`flax.nnx.GroupNorm` with normjax behind it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from normjax.layers.group_norm import group_norm
from normjax.nnx._shared import common, present, promoted, read


class GroupNorm(nnx.GroupNorm):
    """Group normalization: `flax.nnx.GroupNorm`, with a variance that is safe.

    Change the import and nothing else: constructor and call take the same arguments, and the
      variables have the same
    names (`scale`, `bias`: `nnx.Param`), shapes and dtypes, so checkpoints load both ways. See
    `normjax.group_norm` for the mathematics.

    Beyond Flax:
      - The variance is safe, so `use_fast_variance` chooses nothing.
      - Input and parameters keep their precision: `promote_dtype` and `dtype` decide the dtype of y
        alone.
      - Statistics go with their groups whatever `reduction_axes` are; `flax.nnx` repeats them along
        axis 1, and so mixes them up where more than one axis is left out.
      - Masks need not be boolean, nor have the size of the channels; masked elements may be NaN,
        and where nothing counts, the mean is 0 and the variance 1.
      - Axes out of range or repeated are refused.

    Args:
      num_features: the number of channels, the last axis.
      num_groups: how many groups, a divisor of the channels.
      group_size: channels in a group, instead; with `num_groups=None`.
      epsilon: added to the variance.
      dtype: of y; None for that of x, scale and bias together.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: makes the bias.
      scale_init: makes the scale.
      reduction_axes: the axes that mean and variance are taken over, the last among them; None for
        all but the first.
      axis_name: mapped axis that the reduced axes are sharded over.
      axis_index_groups: groups of indices of that axis that share.
      use_fast_variance: accepted for compatibility.
      promote_dtype: from `(x, scale, bias)` and `dtype` to arrays of the dtypes to compute in.
      rngs: keys for the initializers.
      bias_metadata: metadata of the bias variable.
      scale_metadata: metadata of the scale variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import GroupNorm
      >>> norm = GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
      >>> print(norm(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3))
      [[-1.  1. -1.  1.]]
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, channels along the last axis.
          mask: broadcastable to x, True where an element counts.

        Returns:
          y, of x's shape.
        """
        x = jnp.asarray(x)
        leaves = read(self, "scale", "bias")
        x, dtype = promoted(self, x, leaves)
        y, _ = group_norm(
            present(leaves, self, x),
            {},
            x,
            False,
            num_groups=self.num_groups,
            reduction_axes=self.reduction_axes,
            dtype=dtype,
            **common(self, mask),
        )
        return y
