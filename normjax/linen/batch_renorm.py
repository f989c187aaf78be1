"""Batch renormalization for `flax.linen`."""

from __future__ import annotations

from functools import partial
from typing import Never

import jax
from flax import linen as nn

from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax.layers.batch_renorm import Limit, take_renorm_step
from normjax.linen.batch_norm import BatchNorm, normalize


class BatchRenorm(BatchNorm):
    """Batch renormalization, in the manner of `flax.linen.BatchNorm`.

    It has the arguments and variables of `normjax.linen.BatchNorm`, and a `count` of batches in
    `batch_stats`, which schedules go by. See `normjax.batch_renorm` for the mathematics.

    Args:
      use_running_average: whether to normalize by the running statistics (at inference) instead of
        the batch's (in training). Set it here or in the call, not in both.
      axis: the feature axis. Mean and variance are taken over all other axes.
      momentum: weight of the old running value; the batch's value has the weight `1 - momentum`.
        None: the mean over all batches.
      epsilon: added to the variance, which may be 0.
      dtype: dtype of y. None: the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale. It is redundant if a linear layer follows,
        directly or after a ReLU.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale. Zeros suit the last norm of a residual branch (Goyal et
        al. 2017, section 5.1).
      axis_name: mapped axis of `shard_map`, `pmap` or `vmap` that statistics are shared over, in
        training. Plain `jit` needs none: it sees the whole batch.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None: one group of all.
      use_fast_variance: accepted for compatibility, without effect: the variance is fast and safe.
      force_float32_reductions: whether running statistics are stored in float32. False stores them
        in `param_dtype`, as Flax does, which must be float32 or wider to train with.
      running_var: which variance is stored: "biased" (divided by n, as in Flax) or "unbiased"
        (divided by n - 1, as in PyTorch).
      virtual_batch_size: in training, each slice of this many examples along axis 0 is normalized
        by its own statistics (ghost batches), and `axis_name` only shares the running statistics.
        None: the whole batch is.
      skip_nonfinite: whether a batch with a mean or variance that is NaN or infinite leaves the
        running statistics as they were, on all devices alike: for dynamic loss scaling.
      frozen: whether to use the running statistics and leave them alone, whatever
        `use_running_average` says. Scale and bias still have gradients.
      scale_offset: added to the scale, in float32 or wider. 1.0 suits checkpoints that store `scale
        - 1`; the default of `scale_init` then makes zeros.
      r_max: limit of r, the ratio of the batch's standard deviation to the running one: r stays
        between `1 / r_max` and `r_max`. At least 1; a number, or a schedule: a function of the
        count of batches.
      d_max: limit of d, the difference of the batch's mean from the running one, in running
        standard deviations: d stays between `-d_max` and `d_max`. At least 0; a number or a
        schedule.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import BatchRenorm
      >>> r_max = lambda count: jnp.clip(count / 10_000, 1.0, 3.0)
      >>> norm = BatchRenorm(use_running_average=False, r_max=r_max, d_max=0.0)
      >>> variables = norm.init(jax.random.key(0), jnp.array([[1.0], [3.0]]))
      >>> y, updates = norm.apply(variables, jnp.array([[1.0], [3.0]]), mutable=["batch_stats"])
      >>> print(y.round(3).ravel(), updates["batch_stats"]["count"])
      [-1.  1.] 1
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0

    @nn.compact
    @with_foreign_names
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        **_foreign: Never,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, features along `axis`.
          use_running_average: whether to use the running statistics; here or in the constructor.
          mask: broadcastable to x: True where an element counts, or the weight of each.

        Returns:
          y, of x's shape; its dtype is `dtype`, or the one that x, scale and bias promote to.
        """
        if _foreign:
            raise_for_foreign(BatchRenorm.__call__, _foreign)
        take = partial(take_renorm_step, r_max=self.r_max, d_max=self.d_max)
        return normalize(self, "batch_renorm", take, x, use_running_average, mask)
