"""`flax.linen.BatchNorm` with normjax behind it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

from normjax import _checks
from normjax._typing import RunningVar
from normjax.layers._batch import Settings, normalize_by_batch


class BatchNorm(nn.BatchNorm):
    """Batch normalization: `flax.linen.BatchNorm`, with a variance that is safe.

    Change the import and nothing else: constructor and call take the same arguments, and the variables have the same
    names (`params`: `scale`, `bias`; `batch_stats`: `mean`, `var`), shapes and dtypes, so checkpoints load both ways.
    See `normjax.batch_norm` for the mathematics.

    Beyond Flax:
      - The variance is safe and the statistics are float32 (or wider) in every mode, so `use_fast_variance` and
        `force_float32_reductions` choose nothing but, for the latter, the dtype of the running statistics.
      - Masked elements may be NaN; a feature of which nothing counts keeps its running statistics.
      - Axes out of range or repeated are refused.
      - `momentum=None` is the mean over all batches, with a variable `count` in `batch_stats`.

    Attributes:
      running_var: which variance is stored: "biased" (Flax) or "unbiased" (PyTorch).
      virtual_batch_size: ghost batches of that many examples, in training.
      frozen: use the running statistics and leave them alone, whatever `use_running_average` says. Scale and bias still
        have gradients.

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
    frozen: bool = False

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
        population = self.frozen or nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = jnp.asarray(x)
        kept = _checks.axes("BatchNorm", "axis", self.axis, x.shape)
        features = tuple(x.shape[axis] for axis in kept)
        # In Flax's dtypes; with complex x the mean turns complex in training.
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, features, dtype),
            "var": self.variable("batch_stats", "var", jnp.ones, features, dtype),
        }
        if self.momentum is None:
            running["count"] = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        params = {}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)
        dtype = canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        y, batch_stats = normalize_by_batch(
            params,
            {leaf: variable.value for leaf, variable in running.items()},
            x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype),
            not population,
            None if mask is None else jnp.asarray(mask, bool),
            _settings(self, kept, dtype),
        )
        if not (population or self.is_initializing()):
            for leaf, value in batch_stats.items():
                running[leaf].value = value
        return y


def _settings(norm: BatchNorm, kept: tuple[int, ...], dtype: Any) -> Settings:
    """Flax's names in normjax's; no axis is touched at initialization."""
    mapped = not norm.is_initializing()
    return Settings(
        feature_axes=kept,
        momentum=norm.momentum,
        epsilon=norm.epsilon,
        running_var=norm.running_var,
        axis_name=norm.axis_name if mapped else None,
        axis_index_groups=norm.axis_index_groups if mapped else None,
        virtual_batch_size=norm.virtual_batch_size,
        dtype=dtype,
        drop_in=True,
    )
