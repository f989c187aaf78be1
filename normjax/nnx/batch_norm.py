"""`flax.nnx.BatchNorm`, computed by normjax."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Never

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
from jax.nn.initializers import ones, zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import AxisIndexGroups, BatchStats, DTypeLike, Initializer, RunningVar
from normjax.layers.affine import initial_scale
from normjax.layers.batch_norm import infer_step, train_step
from normjax.layers.batch_step import (
    BatchStep,
    check_batch_step,
    take_step,
    with_complex_mean,
)
from normjax.nnx._shared import common, present, promoted, read
from normjax.statistics.population import POPULATION


class BatchNorm(nnx.BatchNorm):
    """Batch normalization: `flax.nnx.BatchNorm` with a safe variance.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`scale`, `bias`: `nnx.Param`; `mean`, `var`: `nnx.BatchStat`), shapes and
    dtypes, so checkpoints can be exchanged in both directions. See `normjax.batch_norm` for the
    equations.

    Differences from Flax:
      - The variance is safe (it does not suffer from cancellation); `use_fast_variance` has no
        effect.
      - Input and running statistics keep their precision: `promote_dtype` and `dtype` only decide
        the dtype of y. (With `dtype=bfloat16`, Flax rounds x and the mean before it subtracts them:
        1003 - 1000 gives 4.)
      - Masked elements may be NaN. A feature without any element that counts keeps its running
        statistics.
      - Axes out of range raise an error.
      - `momentum=None` stores the mean over all batches, with an `nnx.BatchStat` named `count`.

    Args:
      num_features: size of the feature axis.
      use_running_average: whether to normalize by running statistics (at inference) instead of
        batch statistics (in training). `model.train()`, `model.eval()` and the call override it.
      axis: the feature axis. The mean and variance are computed over all other axes.
      momentum: weight of the old running value; the value of the batch has the weight `1 -
        momentum`. With None, the running statistics are the mean over all batches.
      epsilon: added to the variance. It may be 0.
      dtype: dtype of y. None means the dtype that x, statistics, scale and bias promote to.
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
      promote_dtype: function of `(x, mean, var, scale, bias)` and `dtype` that returns the arrays
        promoted. Only the dtype of y follows from it.
      running_var: the estimate of the variance that is stored: "biased" (divided by n, as in Flax)
        or "unbiased" (divided by n - 1, as in PyTorch).
      virtual_batch_size: number of examples in a ghost batch: in training, each slice of this many
        examples along axis 0 is normalized by its own statistics, and only the running statistics
        are all-reduced over `axis_name`. None normalizes the batch as a whole.
      skip_nonfinite: whether to keep the running statistics unchanged, on all devices, if the mean
        or variance of the batch is NaN or infinite. Use it with dynamic loss scaling.
      frozen: whether to always use the running statistics and never update them, even after
        `model.train()`. Scale and bias still have gradients.
      scale_offset: constant added to the stored scale, in float32 or wider. Use 1.0 for checkpoints
        that store `scale - 1`; the default `scale_init` then stores zeros.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias variable.
      scale_metadata: metadata of the scale variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import BatchNorm
      >>> norm = BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = norm(jnp.array([[1.0], [3.0]]))
      >>> print(y.round(3).ravel(), norm.mean[...])
      [-1.  1.] [1.]
    """

    _function = "batch_norm"  # errors begin with this name

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        running_var: RunningVar = "biased",
        virtual_batch_size: int | None = None,
        skip_nonfinite: bool = False,
        frozen: bool = False,
        scale_offset: float = 0.0,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # type: ignore[arg-type]
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=initial_scale(scale_init, scale_offset),
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.running_var: RunningVar = running_var
        self.virtual_batch_size = virtual_batch_size
        self.skip_nonfinite = skip_nonfinite
        self.frozen = frozen
        self.scale_offset = scale_offset
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

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
          use_running_average: overrides the constructor, `model.train()` and `model.eval()`.
          mask: broadcastable to x, True for elements that count; or non-negative weights.

        Returns:
          y, with the shape of x.
        """
        if _foreign:
            raise_for_foreign(BatchNorm.__call__, _foreign)
        infer = self.frozen or nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm: use_running_average is not set. "
            "Expected it in the constructor or the call; got None in both. "
            "Call model.train() or model.eval() first.",
        )
        x = _checks.array(type(self).__name__, x)
        running = {
            leaf: getattr(self, leaf)[...]
            for leaf in ("mean", "var", "count")
            if hasattr(self, leaf)
        }
        if hasattr(self, POPULATION) and not self.frozen:
            running[POPULATION] = getattr(self, POPULATION).get_value()
        leaves = read(self, "scale", "bias")
        x, dtype = promoted(self, x, leaves, (running["mean"], running["var"]))
        step = check_batch_step(
            self._function,
            present(leaves, self, x, self.axis),
            with_complex_mean(running, x),
            x,
            not infer,
            feature_axes=self.axis,
            momentum=self.momentum,
            running_var=self.running_var,
            virtual_batch_size=self.virtual_batch_size,
            skip_nonfinite=self.skip_nonfinite,
            dtype=dtype,
            one_value=True,
            **common(self, mask),
        )
        y, batch_stats = self._take(step)
        if POPULATION in running:
            getattr(self, POPULATION).set_value(batch_stats.pop(POPULATION))
        if POPULATION in running or not infer:
            for leaf, value in batch_stats.items():
                getattr(self, leaf)[...] = jax.lax.stop_gradient(value)
        return y

    def _take(self, step: BatchStep) -> tuple[jax.Array, BatchStats]:
        return take_step(step, train_step, infer_step)
