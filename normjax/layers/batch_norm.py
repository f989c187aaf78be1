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
      use_scale: whether to use a learnable scale. A scale is redundant if a linear layer follows,
        directly or after a ReLU.
      use_bias: whether to use a learnable bias.
      scale_init: initializer of the scale; zeros for the last layer of a residual branch (Goyal et
        al. 2017, section 5.1).
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias. The statistics have it too if it is float32 or wider,
        and otherwise are float32, since narrower ones would lose small updates.
      count: whether to count batches, as the cumulative mode (`momentum=None`) requires.

    Returns:
      `params`: a dict of `scale` (ones) and `bias` (zeros), each `(*num_features)`.
      `batch_stats`: a dict of `mean` (zeros) and `var` (ones), each `(*num_features)`, and `count`
        (0, int32) if `count=True`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

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
    r"""Normalizes each feature by batch statistics in training, by running statistics at inference.

    .. math:: y = (o + \gamma) \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training, the mean and the biased variance are computed over the batch, that is, over all
    axes except the feature axes. The running statistics are updated towards them: `new = momentum *
    old + (1 - momentum) * batch`. At inference, the running statistics normalize x, and are
    returned unchanged. Use batch norm in networks that are trained on batches of about 16 examples
    or more. If each device has fewer, share statistics over devices (`axis_name`).

    Args:
      params: dict of `scale` and `bias`, each `(*features)`, or `(*leading, *features)` for a scale
        and bias per example (conditional batch norm). Leading dimensions must match the first
        non-feature axes of x. Missing leaves are skipped.
      batch_stats: dict of `mean` and `var`, each `(*features)`, and maybe `count`.
      x: floating-point or complex, any rank >= 1, such as `(batch, height, width, features)`.
      train: Python bool. It selects training or inference at trace time.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      feature_axes: the axes along which statistics, scale and bias vary. You can list them in any
        order; a leaf has the sizes of these axes in ascending order.
      momentum: weight of the old running value. With None, the running statistics are the mean over
        all batches so far; this needs `count`.
      epsilon: added to the variance.
      running_var: the estimate of the variance that is stored: "biased" (Flax, Keras) or "unbiased"
        (PyTorch, the paper).
      mask: bool, broadcastable to x, True for elements that count; or non-negative weights, one per
        element (a weight of 2 counts as two elements). Elements that do not count are normalized
        too, but do not affect the statistics. If one of them is NaN or infinite, its y is the bias,
        which derivatives treat as a constant. A feature without any element that counts is
        normalized by its running statistics, which do not change. Weights have gradients; the
        gradient of a weight of 0 is 0.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) over which the statistics are
        all-reduced in training. Plain jit with a sharded x does not need it: the statistics are
        computed over the global batch anyway.
      axis_index_groups: groups of indices of that axis; each group shares statistics, as in
        `jax.lax.psum`.
      virtual_batch_size: number of examples in a ghost batch. In training, each slice of that many
        examples along axis 0 is normalized by its own statistics, and the running statistics use
        the whole batch. With `axis_name`, each device slices its own examples, and the running
        statistics use the examples of all devices.
      skip_nonfinite: whether to keep all running statistics unchanged, on all devices, if the mean
        or variance of any feature of the batch is NaN or infinite. Use it with dynamic loss
        scaling. By default, the running statistics become NaN or infinite and stay so, as in Flax.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and the new `batch_stats`, with the structure, shapes and dtypes of
      the old ones. Statistics and y are computed in at least float32 and rounded once. The variance
      does not suffer from cancellation, not even on the first step: its error is at most 5e-5 of
      `var + epsilon`. y is accurate up to standard deviations of 1.8e19 (divided by the square root
      of the number of elements if `epsilon=0`), and its gradients up to 1e17. Beyond that, float32
      cannot hold the variance: it is infinite, and y is the bias.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an invalid argument: wrong axes, leaves,
        dtypes or masks, an axis name that is not in scope, a traced `train`, or, in training, a
        single value per feature or running statistics narrower than float32.

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
    """Normalizes x by its batch statistics, and updates the running statistics."""
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
