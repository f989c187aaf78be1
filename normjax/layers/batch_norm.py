"""Batch normalization (Ioffe & Szegedy, 2015)."""

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
from normjax.layers.affine import (
    init_params,
    lay_out,
    normalize,
)
from normjax.layers.batch_step import (
    BatchSpec,
    batch_or_running,
    check_batch_step,
    into_ghosts,
    take_step,
)
from normjax.layers.jit_step import jit_step
from normjax.statistics.elements import read
from normjax.statistics.reduction import batch_moments
from normjax.statistics.running import init_batch_stats


@with_foreign_names
def batch_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = ones,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    count: bool = False,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters and running statistics that `batch_norm` starts from.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether there is a scale. A linear layer that follows, also after a ReLU, can do
        without it.
      use_bias: whether there is a bias.
      scale_init: makes the scale; zeros for the last layer of a residual branch (Goyal et al. 2017,
        section 5.1).
      scale_offset: what the layer adds to the scale. `ones`, the default of `scale_init`, then
        makes `1 - scale_offset`.
      bias_init: makes the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias, and of the statistics if it is float32 or wider;
        narrower statistics would lose small updates.
      count: whether to count batches, as the cumulative mode (`momentum=None`) requires.

    Returns:
      `params`: a dict of `scale` (ones) and `bias` (zeros), each `(*num_features)`.
      `batch_stats`: a dict of `mean` (zeros) and `var` (ones), each `(*num_features)`, and `count`
        (0, int32) if `count=True`.

    Raises:
      ValueError: for a size that is not positive. TypeError: for an integer `param_dtype`, or a
        random initializer without a key.

    Example:
      >>> import normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(3, use_bias=False)
      >>> print(params["scale"], batch_stats["mean"], batch_stats["var"])
      [1. 1. 1.] [0. 0. 0.] [1. 1. 1.]
    """
    if _foreign:
        raise_for_foreign(batch_norm_init, _foreign)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    params = init_params("batch_norm_init", num_features, makers, key, param_dtype, scale_offset)
    features = _checks.sizes("batch_norm_init", "num_features", num_features)
    return params, init_batch_stats(features, param_dtype, count=count)


@jax.named_scope("batch_norm")
@with_foreign_names
def batch_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
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
    r"""Normalizes each feature by the batch's statistics, or by running ones at inference.

    .. math:: y = (o + \gamma) \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training the mean and the biased variance are taken over the batch, that is over all axes but
    the features, and the running statistics move towards them: `new = momentum * old + (1 -
    momentum) * batch`. At inference the running statistics are used, and returned unchanged. Use it
    in networks trained on batches of about 16 examples or more; share statistics over devices
    (`axis_name`) if each device has fewer.

    Args:
      params: dict of `scale` and `bias`, each `(*features)`, or `(*leading, *features)` for one of
        each example (conditional batch norm). Leading sizes must match the first non-feature axes
        of x. Missing leaves are left out of the formula.
      batch_stats: dict of `mean` and `var`, each `(*features)`, and maybe `count`.
      x: floating-point or complex, any rank >= 1, such as `(batch, height, width, features)`.
      train: Python bool: whether to compile training or inference.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      feature_axes: the axes that statistics, scale and bias run along. Leaves have the sizes of
        these axes in ascending order, also if they are given in another order.
      momentum: weight of the old running value. None: the mean over all batches so far (needs
        `count`).
      epsilon: added to the variance.
      running_var: which estimate of the variance is stored, "biased" (Flax, Keras) or "unbiased"
        (PyTorch, the paper).
      mask: bool, broadcastable to x: True where an element counts. Other elements are normalized
        too, but do not affect the statistics; if one is NaN or infinite, y is the bias there, a
        constant. A feature of which nothing counts is normalized by its running statistics, which
        do not change. Or real and not negative: the weight of each element, which counts as that
        many elements. Weights have gradients; that of a weight of 0 is 0.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) over which the statistics are shared,
        in training. Plain jit with sharded x needs none: its statistics are of the global batch.
      axis_index_groups: groups of indices of that axis that share statistics, as in `jax.lax.psum`.
      virtual_batch_size: ghost batches: in training, normalizes each slice of that many examples of
        axis 0 by its own statistics; the running statistics use the whole batch. With `axis_name`
        each device cuts its own examples; the running statistics use those of all devices.
      skip_nonfinite: whether a batch whose mean or variance is NaN or infinite in some feature
        leaves all running statistics as they were, on all devices alike. Use it with dynamic loss
        scaling. By default they become NaN or infinite for good, as in Flax.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, of x's shape, and the new `batch_stats`, of the old structure, shapes and dtypes.
      Statistics and y are computed in at least float32 and rounded once. The variance is safe, also
      on the first step: right to 5e-5 of `var + epsilon`. y is right as long as float32 holds the
      variance: up to standard deviations of 1.8e19 (divided by the root of the number of elements
      with `epsilon=0`), gradients up to 1e17. Beyond, the variance is infinite, and y is the bias.

    Raises:
      ValueError, TypeError, NameError: at trace time, for arguments that do not fit: axes, leaves,
        dtypes, a mask, an axis name that is not in scope, a traced `train`, one value per feature
        in training, running statistics in less than float32 in training.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(2)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, batch_stats = nj.batch_norm(params, batch_stats, x, train=True, momentum=0.5)
      >>> print(y.round(3), batch_stats["mean"], batch_stats["var"])
      [[-1. -1.]
       [ 1.  1.]] [ 1. 10.] [ 1.  50.5]

    References:
      Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
      Covariate Shift" (ICML 2015), Algorithms 1 and 2. Ghost batches: Hoffer, Hubara & Soudry
      (2017), Algorithm 1. Conditional: de Vries et al., "Modulating early visual processing by
      language" (2017), eq. 4.
    """
    if _foreign:
        raise_for_foreign(batch_norm, _foreign)
    step = check_batch_step(
        "batch_norm",
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
    return take_step(step, train_step, infer_step)


@partial(jit_step, like=("x", "batch_stats"))
def train_step(
    params: Params,
    batch_stats: BatchStats,
    x: Array,
    mask: Array | None,
    momentum: Array | None,
    spec: BatchSpec,
) -> tuple[Array, BatchStats]:
    """Normalizes x by its own statistics, and moves the running ones towards them."""
    shape = x.shape
    params = lay_out(params, x.ndim, spec)
    params, x, mask, spec = into_ghosts(params, x, mask, spec)
    inputs = read(x, mask)
    batch = batch_moments(spec, inputs, mask)
    mean, var = batch_or_running(batch, batch_stats, spec)
    y = normalize(inputs, mean, var, params, spec.epsilon)
    new = spec.update(batch_stats, batch, momentum)
    return y.reshape(shape).astype(spec.dtype), new


@jit_step
def infer_step(
    params: Params, batch_stats: BatchStats, x: Array, mask: Array | None, spec: BatchSpec
) -> Array:
    """Normalizes x by the running statistics."""
    params = lay_out(params, x.ndim, spec)
    inputs = read(x, mask)
    mean, var = spec.expand(batch_stats["mean"]), spec.expand(batch_stats["var"])
    y = normalize(inputs, mean, var, params, spec.epsilon)
    return y.astype(spec.dtype)
