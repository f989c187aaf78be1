"""`flax.nnx.BatchNorm` with normjax behind it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
from jax.nn.initializers import ones, zeros

from normjax._typing import AxisIndexGroups, BatchStats, DTypeLike, Initializer, RunningVar
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
    """Batch normalization: `flax.nnx.BatchNorm`, with a variance that is safe.

    Change the import and nothing else: constructor and call take the same arguments, and the
      variables have the same
    names (`scale`, `bias`: `nnx.Param`; `mean`, `var`: `nnx.BatchStat`), shapes and dtypes, so
    checkpoints load both ways. See `normjax.batch_norm` for the mathematics.

    Beyond Flax:
      - The variance is safe, so `use_fast_variance` chooses nothing.
      - Input and running statistics keep their precision: `promote_dtype` and `dtype` decide the
        dtype of y alone. (With `dtype=bfloat16`, Flax rounds first and subtracts then: 1003 - 1000
        gives 4.)
      - Masked elements may be NaN; a feature of which nothing counts keeps its running statistics.
      - Axes out of range are refused.
      - `momentum=None` is the mean over all batches, with a `nnx.BatchStat` named `count`.

    Args:
      num_features: the size of the feature axis.
      use_running_average: whether to use the running statistics; `model.train()`, `model.eval()`
        and the call set it.
      axis: the feature axis.
      momentum: weight of the old running value.
      epsilon: added to the variance.
      dtype: of y; None for that of x, statistics, scale and bias together.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: makes the bias.
      scale_init: makes the scale.
      axis_name: mapped axis to share the statistics over.
      axis_index_groups: groups of indices of that axis that share.
      use_fast_variance: accepted for compatibility; the variance is fast and safe.
      promote_dtype: from `(x, mean, var, scale, bias)` and `dtype` to arrays of the dtypes to
        compute in.
      running_var: which variance is stored: "biased" (Flax) or "unbiased" (PyTorch).
      virtual_batch_size: ghost batches of that many examples, in training.
      frozen: use the running statistics and leave them alone, also after `model.train()`. Scale and
        bias still have gradients.
      rngs: keys for the initializers.
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

    _function = "batch_norm"  # the name that errors begin with

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
        frozen: bool = False,
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
            scale_init=scale_init,
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
        self.frozen = frozen
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

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
          use_running_average: overrides what the constructor or `model.eval()` said.
          mask: broadcastable to x, True where an element counts.

        Returns:
          y, of x's shape.
        """
        infer = self.frozen or nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm: use_running_average is not set. Expected it in the constructor or the call; "
            "got None in both. Call model.train() or model.eval() first.",
        )
        x = jnp.asarray(x)
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
