"""`flax.linen.BatchNorm`, computed by normjax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never

import jax
import jax.numpy as jnp
from flax import linen as nn

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import BatchStats, RunningVar
from normjax.layers.batch_norm import infer_step, train_step
from normjax.layers.batch_step import (
    BatchStep,
    check_batch_step,
    take_step,
    with_complex_mean,
)
from normjax.linen._shared import common, declare, promoted, sizes
from normjax.statistics.population import POPULATION, is_replaced


class BatchNorm(nn.BatchNorm):
    """Batch normalization: `flax.linen.BatchNorm` with a safe variance.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`params`: `scale`, `bias`; `batch_stats`: `mean`, `var`), shapes and
    dtypes, so checkpoints can be exchanged in both directions. See `normjax.batch_norm` for the
    equations.

    Differences from Flax:
      - The variance is safe (it does not suffer from cancellation), and statistics are in float32
        or wider in every mode. `use_fast_variance` has no effect; `force_float32_reductions` only
        sets the dtype of the running statistics.
      - Masked elements may be NaN. A feature without any element that counts keeps its running
        statistics.
      - Axes that are repeated or out of range raise an error.
      - `momentum=None` stores the mean over all batches, with a variable `count` in `batch_stats`.

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

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.linen import BatchNorm
      >>> x = jnp.array([[1.0], [3.0]])
      >>> norm = BatchNorm(use_running_average=False, momentum=0.5)
      >>> variables = norm.init(jax.random.key(0), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> print(y.round(3).ravel(), updates["batch_stats"]["mean"])
      [-1.  1.] [1.]
    """

    running_var: RunningVar = "biased"
    virtual_batch_size: int | None = None
    skip_nonfinite: bool = False
    frozen: bool = False
    scale_offset: float = 0.0

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
          use_running_average: whether to use the running statistics. Set it here or in the
            constructor.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x. Its dtype is `dtype`, or the one that x, scale and bias promote
          to.
        """
        if _foreign:
            raise_for_foreign(BatchNorm.__call__, _foreign)
        return normalize(self, "batch_norm", _take, x, use_running_average, mask)


def _take(step: BatchStep) -> tuple[jax.Array, BatchStats]:
    return take_step(step, train_step, infer_step)


def normalize(
    norm: BatchNorm,
    function: str,
    take: Callable[[BatchStep], tuple[jax.Array, BatchStats]],
    x: jax.Array,
    use_running_average: bool | None,
    mask: Any,
) -> jax.Array:
    """Declares the variables of a batch norm or batch renorm, and takes its step."""
    given = nn.merge_param("use_running_average", norm.use_running_average, use_running_average)
    infer = norm.frozen or given
    x = _checks.array(type(norm).__name__, x)
    features = sizes(norm, x, "axis")
    count = norm.momentum is None or function == "batch_renorm"
    running = _declare_running(norm, features, count=count)
    params = declare(norm, features, scale=norm.use_scale, bias=norm.use_bias)
    x, dtype = promoted(norm, x, *params.values())
    values = {leaf: variable.value for leaf, variable in running.items()}
    step = check_batch_step(
        function,
        params,
        with_complex_mean(values, x),
        x,
        not infer,
        feature_axes=norm.axis,
        momentum=norm.momentum,
        running_var=norm.running_var,
        virtual_batch_size=norm.virtual_batch_size,
        skip_nonfinite=norm.skip_nonfinite,
        dtype=dtype,
        one_value=True,
        **common(norm, mask),
    )
    y, batch_stats = take(step)
    if is_replaced(values) or not (infer or norm.is_initializing()):
        for leaf, value in batch_stats.items():
            running[leaf].value = value
    return y


def _declare_running(
    norm: BatchNorm, features: tuple[int, ...], *, count: bool
) -> dict[str, nn.Variable]:
    """Declares running statistics in Flax's dtypes; the mean is complex if x is, in training."""
    dtype = jnp.float32 if norm.force_float32_reductions else norm.param_dtype
    running = {
        "mean": norm.variable("batch_stats", "mean", jnp.zeros, features, dtype),
        "var": norm.variable("batch_stats", "var", jnp.ones, features, dtype),
    }
    if count:
        running["count"] = norm.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
    if norm.has_variable("batch_stats", POPULATION) and not norm.frozen:
        running[POPULATION] = norm.variable("batch_stats", POPULATION)
    return running
