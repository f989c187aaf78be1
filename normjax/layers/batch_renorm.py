"""Batch renormalization (Ioffe, 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import Array, ArrayLike

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import (
    Activations,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DTypeLike,
    Initializer,
    Mask,
    Params,
    PRNGKey,
    RunningVar,
)
from normjax.layers._renorm import Limit, correct, take_limits
from normjax.layers.affine import (
    init_params,
    lay_out,
    normalize,
)
from normjax.layers.batch_norm import infer_step, train_step
from normjax.layers.batch_step import (
    BatchSpec,
    BatchStep,
    batch_or_running,
    check_batch_step,
    into_ghosts,
    running_like,
    take_step,
)
from normjax.layers.jit_step import jit_step
from normjax.statistics.elements import read
from normjax.statistics.population import is_replaced
from normjax.statistics.reduction import batch_moments
from normjax.statistics.running import init_batch_stats


@with_foreign_names
def batch_renorm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = ones,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters and running statistics that `batch_renorm` starts from.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias.
      scale_init: initializer of the scale; zeros for the last layer of a residual branch.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias. The statistics have it too if it is float32 or wider,
        and otherwise are float32, since narrower ones would lose small updates.

    Returns:
      `params`: a dict of `scale` (ones) and `bias` (zeros), each `(*num_features)`.
      `batch_stats`: a dict of `mean` (zeros) and `var` (ones), each `(*num_features)`, and `count`
        (0, int32), the number of batches, which is the argument of schedules of `r_max` and
        `d_max`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> params, batch_stats = nj.batch_renorm_init(2)
      >>> print(batch_stats["var"], batch_stats["count"])
      [1. 1.] 0
    """
    if _foreign:
        raise_for_foreign(batch_renorm_init, _foreign)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    params = init_params("batch_renorm_init", num_features, makers, key, param_dtype, scale_offset)
    features = _checks.sizes("batch_renorm_init", "num_features", num_features)
    return params, init_batch_stats(features, param_dtype, count=True)


@jax.named_scope("batch_renorm")
@with_foreign_names
def batch_renorm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    r_max: Limit = 3.0,
    d_max: Limit = 5.0,
    feature_axes: Axes = -1,
    momentum: float | ArrayLike | None = 0.99,
    epsilon: float = 1e-5,
    running_var: RunningVar = "biased",
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    virtual_batch_size: int | None = None,
    skip_nonfinite: bool = False,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Applies batch norm, corrected towards the running statistics within limits.

    .. math:: y = \gamma \left(\frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} r + d\right) + \beta

    .. math:: r = \operatorname{clip}\left(\sqrt{\frac{\sigma_B^2 + \epsilon}{\sigma^2 + \epsilon}},
              \frac1{r_{max}}, r_{max}\right), \qquad
              d = \operatorname{clip}\left(\frac{\mu_B - \mu}{\sqrt{\sigma^2 + \epsilon}}, -d_{max},
              d_{max}\right)

    where the index B marks batch statistics; the others are the running statistics before this
    batch. Gradients treat r and d as constants. Within the limits, training and inference compute
    the same. With `r_max=1, d_max=0` this is `batch_norm`. Use it if batches are small, or if their
    examples are not independent.

    Args:
      params: as in `batch_norm`.
      batch_stats: as in `batch_norm`; with `count` if a limit is a schedule.
      x: floating-point or complex, any rank >= 1, such as `(batch, height, width, features)`.
      train: Python bool. It selects training or inference at trace time.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      r_max: limit of r, at least 1. A number, a scalar array, or a schedule as in optax, which maps
        the number of batches so far to a limit. Infinity means no limit. Start at 1, and increase
        it once the running statistics have settled: the paper trains 5,000 steps as batch norm,
        then increases it to 3 by step 40,000.
      d_max: limit of d, at least 0. A number, an array or a schedule, like `r_max`. The paper
        increases it from 0 to 5 by step 25,000.
      feature_axes: as in `batch_norm`, like all arguments below.
      momentum: weight of the old running value.
      epsilon: added to the variances.
      running_var: the estimate of the variance that is stored, "biased" or "unbiased".
      mask: bool, broadcastable to x, True for elements that count; or non-negative weights, one per
        element.
      axis_name: mapped axis or axes over which the statistics are all-reduced in training.
      axis_index_groups: groups of indices of that axis; each group shares statistics.
      virtual_batch_size: ghost batches, each with its own r and d.
      skip_nonfinite: whether to keep the running statistics unchanged if the statistics of the
        batch are not finite.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and the new `batch_stats`, with the structure, shapes and dtypes of
      the old ones.

    Raises:
      ValueError, TypeError, NameError: at trace time, for limits out of range, for a schedule
        without a count, and whenever `batch_norm` raises them.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_renorm_init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, _ = nj.batch_renorm(params, batch_stats, x, train=True)
      >>> print(abs(y - x).max() < 1e-4)  # the running statistics are mean 0 and variance 1
      True
      >>> r_max = lambda count: jnp.clip(count / 10_000, 1.0, 3.0)
      >>> y, _ = nj.batch_renorm(params, batch_stats, x, train=True, r_max=r_max, d_max=0.0)
      >>> print(y.round(3).ravel())
      [-1.  1.]

    References:
      Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
      Models" (NeurIPS 2017),
      Algorithm 1 and section 4.
    """
    if _foreign:
        raise_for_foreign(batch_renorm, _foreign)
    step = check_batch_step(
        "batch_renorm",
        params,
        batch_stats,
        x,
        train,
        scale_offset=scale_offset,
        feature_axes=feature_axes,
        momentum=momentum,
        epsilon=epsilon,
        running_var=running_var,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        skip_nonfinite=skip_nonfinite,
        dtype=dtype,
    )
    return take_renorm_step(step, r_max, d_max)


def take_renorm_step(step: BatchStep, r_max: Limit, d_max: Limit) -> tuple[Array, BatchStats]:
    """Checks the limits and takes a step; inference is the same as for batch norm."""
    limits = take_limits(r_max, d_max, step.batch_stats)
    if is_replaced(step.batch_stats):  # by `recalibrate`, whose result must not depend on them
        return take_step(step, train_step, infer_step)
    return take_step(step, renorm_step, infer_step, limits)


@partial(jit_step, like=("x", "batch_stats"))
def renorm_step(
    params: Params,
    batch_stats: BatchStats,
    x: Array,
    mask: Array | None,
    momentum: Array | None,
    limits: tuple[Array, Array],
    spec: BatchSpec,
) -> tuple[Array, BatchStats]:
    """Takes the `train_step` of batch norm, with scale and bias corrected by r and d."""
    shape = x.shape
    params = lay_out(params, x.ndim, spec)
    params, x, mask, spec = into_ghosts(params, x, mask, spec)
    inputs = read(x, mask)
    batch = batch_moments(spec, inputs, mask)
    mean, var = batch_or_running(batch, batch_stats, spec)
    running_mean, running_var = running_like(batch, batch_stats)
    running = spec.expand(running_mean), spec.expand(running_var)
    corrected = correct(params, (mean, var), running, limits, spec.epsilon)
    y = normalize(inputs, mean, var, corrected, spec.epsilon)
    new = spec.update(batch_stats, batch, momentum)
    return y.reshape(shape).astype(spec.dtype), new
