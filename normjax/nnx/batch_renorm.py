"""Batch renormalization for `flax.nnx`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from normjax._typing import BatchStats
from normjax.layers.batch_renorm import Limit, take_renorm_step
from normjax.layers.batch_step import BatchStep
from normjax.nnx.batch_norm import BatchNorm


class BatchRenorm(BatchNorm):
    """Batch renormalization, with the arguments of `flax.nnx.BatchNorm`.

    It has the arguments and variables of `normjax.nnx.BatchNorm`, and a `count` of batches
    (`nnx.BatchStat`), which is the argument of schedules. See `normjax.batch_renorm` for the
    equations.

    Args:
      num_features: size of the feature axis.
      r_max: limit of r, the ratio of the batch standard deviation to the running one: r is clipped
        to the range from `1 / r_max` to `r_max`. At least 1; a number or a schedule, which is a
        function of the number of batches so far.
      d_max: limit of d, the difference between the batch mean and the running mean, in running
        standard deviations: d is clipped to the range from `-d_max` to `d_max`. At least 0; a
        number or a schedule.
      **arguments: all other arguments of `normjax.nnx.BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import BatchRenorm
      >>> r_max = lambda count: jnp.clip(count / 10_000, 1.0, 3.0)
      >>> norm = BatchRenorm(1, r_max=r_max, d_max=0.0, rngs=nnx.Rngs(0))
      >>> y = norm(jnp.array([[1.0], [3.0]]))
      >>> print(y.round(3).ravel(), norm.count[...])
      [-1.  1.] 1
    """

    _function = "batch_renorm"

    def __init__(
        self, num_features: int, *, r_max: Limit = 3.0, d_max: Limit = 5.0, **arguments: Any
    ):
        super().__init__(num_features, **arguments)
        self.r_max = r_max
        self.d_max = d_max
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _take(self, step: BatchStep) -> tuple[jax.Array, BatchStats]:
        return take_renorm_step(step, self.r_max, self.d_max)
