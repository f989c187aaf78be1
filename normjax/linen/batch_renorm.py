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
    """Batch renormalization, with the arguments of `flax.linen.BatchNorm`.

    It has the arguments and variables of `normjax.linen.BatchNorm`, and a `count` of batches in
    `batch_stats`, which is the argument of schedules. See `normjax.batch_renorm` for the equations.

    Args:
      use_running_average: whether to normalize by running statistics (at inference) instead of
        batch statistics (in training). Set it here or in the call, not in both.
      axis: the feature axis. The mean and variance are computed over all other axes.
      momentum: weight of the old running value; the value of the batch has the weight `1 -
        momentum`. With None, the running statistics are the mean over all batches.
      epsilon: added to the variance. It may be 0.
      dtype: dtype of y. None means the dtype that x, scale and bias promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to use a learnable bias.
      use_scale: whether to use a learnable scale. A scale is redundant if a linear layer follows,
        directly or after a ReLU.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale. Zeros suit the last norm of a residual branch (Goyal et
        al. 2017, section 5.1).
      axis_name: mapped axis of `shard_map`, `pmap` or `vmap` over which statistics are all-reduced
        in training. Plain `jit` does not need it, since it sees the whole batch.
      axis_index_groups: groups of indices of that axis, as in `jax.lax.psum`; each group shares its
        statistics. None means a single group.
      use_fast_variance: has no effect, since the variance is always fast and safe; accepted for
        compatibility.
      force_float32_reductions: whether running statistics are stored in float32. With False, they
        are stored in `param_dtype`, as in Flax; training then requires a `param_dtype` of float32
        or wider.
      running_var: the estimate of the variance that is stored: "biased" (divided by n, as in Flax)
        or "unbiased" (divided by n - 1, as in PyTorch).
      virtual_batch_size: number of examples in a ghost batch: in training, each slice of this many
        examples along axis 0 is normalized by its own statistics, and only the running statistics
        are all-reduced over `axis_name`. None normalizes the batch as a whole.
      skip_nonfinite: whether to keep the running statistics unchanged, on all devices, if the mean
        or variance of the batch is NaN or infinite. Use it with dynamic loss scaling.
      frozen: whether to always use the running statistics and never update them, whatever
        `use_running_average` is. Scale and bias still have gradients.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      r_max: limit of r, the ratio of the batch standard deviation to the running one: r is clipped
        to the range from `1 / r_max` to `r_max`. At least 1; a number or a schedule, which is a
        function of the number of batches so far.
      d_max: limit of d, the difference between the batch mean and the running mean, in running
        standard deviations: d is clipped to the range from `-d_max` to `d_max`. At least 0; a
        number or a schedule.

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
          x: the input, with features along `axis`.
          use_running_average: whether to use the running statistics; here or in the constructor.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x. Its dtype is `dtype`, or the one that x, scale and bias promote
          to.
        """
        if _foreign:
            raise_for_foreign(BatchRenorm.__call__, _foreign)
        take = partial(take_renorm_step, r_max=self.r_max, d_max=self.d_max)
        return normalize(self, "batch_renorm", take, x, use_running_average, mask)
