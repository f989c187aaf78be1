"""Batch renormalization for `flax.linen`."""

from __future__ import annotations

from functools import partial

import jax
from flax import linen as nn

from normjax.layers.batch_renorm import Limit, take_renorm_step
from normjax.linen.batch_norm import BatchNorm, normalize


class BatchRenorm(BatchNorm):
    """Batch renormalization, in the manner of `flax.linen.BatchNorm`.

    Arguments and variables are those of `normjax.linen.BatchNorm`, and a `count` of batches in
    `batch_stats`, which schedules go by. See `normjax.batch_renorm` for the mathematics.

    Attributes:
      r_max: how far the deviations of batch and population may differ, at least 1. A number, or a
        schedule: a function of the count of batches.
      d_max: how far their means may, in deviations; likewise.

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
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, features along `axis`.
          use_running_average: whether to use the running statistics; here or in the constructor.
          mask: broadcastable to x, True where an element counts.

        Returns:
          y, of x's shape; its dtype is `dtype`, or that of x, scale and bias together.
        """
        take = partial(take_renorm_step, r_max=self.r_max, d_max=self.d_max)
        return normalize(self, "batch_renorm", take, x, use_running_average, mask)
