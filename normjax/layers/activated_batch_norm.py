"""In-place activated batch normalization (Rota Bulo, Porzi & Kontschieder, 2018)."""

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
    Params,
    PRNGKey,
    RunningVar,
)
from normjax.layers._activated import (
    ActivatedSpec,
    Activation,
    Name,
    activate,
    activate_by_batch,
    check_activation,
)
from normjax.layers.affine import init_params, lay_out
from normjax.layers.batch_step import check_batch_step, into_ghosts, take_step
from normjax.layers.jit_step import jit_step
from normjax.statistics.running import init_batch_stats


@with_foreign_names
def activated_batch_norm_init(
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
    """Returns the parameters and running statistics that `activated_batch_norm` starts from.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      scale_init: makes the scale; avoid zeros, as the output then says little about x.
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
      >>> params, batch_stats = nj.activated_batch_norm_init(3, use_bias=False)
      >>> print(params["scale"], batch_stats["mean"], batch_stats["var"])
      [1. 1. 1.] [0. 0. 0.] [1. 1. 1.]
    """
    if _foreign:
        raise_for_foreign(activated_batch_norm_init, _foreign)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    params = init_params(
        "activated_batch_norm_init", num_features, makers, key, param_dtype, scale_offset
    )
    features = _checks.sizes("activated_batch_norm_init", "num_features", num_features)
    return params, init_batch_stats(features, param_dtype, count=count)


@jax.named_scope("activated_batch_norm")
@with_foreign_names
def activated_batch_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    activation: Name = "leaky_relu",
    negative_slope: float = 0.01,
    feature_axes: Axes = -1,
    momentum: float | ArrayLike | None = 0.99,
    epsilon: float = 1e-5,
    running_var: RunningVar = "biased",
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    virtual_batch_size: int | None = None,
    skip_nonfinite: bool = False,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Batch norm and an invertible activation; the backward pass needs the output, not x.

    .. math:: z = \varphi(y), \qquad
              y = (|o + \gamma| + \epsilon) \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Use it in place of `batch_norm` and the activation after it if memory is short. The next layer
    stores z for its backward pass anyway. This layer recovers the normalized input from z, by the
    inverse of the activation and of the affine map, so it stores nothing else of x's size. Do not
    use it as the last layer of a residual branch with a scale that starts at zero: see `params`.

    Args:
      params: dict of `scale` and `bias`, as in `batch_norm`. The gain is `|o + scale| + epsilon`,
        since the inverse divides by it; at 0 its derivative is 1. The backward pass magnifies the
        rounding of z by `(|y| + |bias|) / gain`: keep gains within a few orders of magnitude of 1,
        above all in bfloat16.
      batch_stats: dict of `mean` and `var`, each `(*features)`, and maybe `count`.
      x: floating-point, real, any rank >= 1, such as `(batch, height, width, features)`.
      train: Python bool: whether to compile training or inference.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      activation: "leaky_relu", "elu" or "identity". If an ELU was rounded to -1 (y below -16 in
        float32, -5.5 in bfloat16), the gradient of x is taken as at that bound.
      negative_slope: slope of the leaky ReLU below 0; above 0.
      feature_axes: as in `batch_norm`, like the arguments below. For a mask, use `batch_norm`.
      momentum: weight of the old running value.
      epsilon: added to the variance, and to `|scale|`.
      running_var: which estimate of the variance is stored, "biased" or "unbiased".
      axis_name: mapped axis or axes over which the statistics are shared, in training: one
        collective forward, one backward.
      axis_index_groups: groups of indices of that axis that share statistics.
      virtual_batch_size: ghost batches of that many examples, in training.
      skip_nonfinite: whether a batch that is not finite leaves the running statistics as they were.
      dtype: dtype of z, and so of what is stored for the backward pass; None for the dtype of x.

    Returns:
      `z`, of x's shape, and the new `batch_stats`, of the old structure, shapes and dtypes.
      Computed in at least float32 and rounded once. Gradients, of every order and in both modes,
      are exact up to rounding, which is that of z in bfloat16.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an activation that cannot be inverted, a
        complex x, and in all cases in which `batch_norm` raises them.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.activated_batch_norm_init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> z, _ = nj.activated_batch_norm(params, batch_stats, x, train=True, negative_slope=0.1)
      >>> print(z.round(3).ravel())
      [-0.1  1. ]

    References:
      Rota Bulo, Porzi & Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
      of DNNs" (CVPR 2018), section 3.
    """
    if _foreign:
        raise_for_foreign(activated_batch_norm, _foreign)
    chosen = Activation(activation, negative_slope)
    x = _checks.activations("activated_batch_norm", x)
    check_activation("activated_batch_norm", chosen, x)
    step = check_batch_step(
        "activated_batch_norm",
        params,
        batch_stats,
        x,
        train,
        scale_offset=scale_offset,
        feature_axes=feature_axes,
        momentum=momentum,
        epsilon=epsilon,
        running_var=running_var,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        skip_nonfinite=skip_nonfinite,
        dtype=dtype,
        make_spec=partial(ActivatedSpec, activation=chosen),
    )
    return take_step(step, _train_step, _infer_step)


@partial(jit_step, like=("x", "batch_stats"))
def _train_step(
    params: Params,
    batch_stats: BatchStats,
    x: Array,
    mask: None,
    momentum: Array | None,
    spec: ActivatedSpec,
) -> tuple[Array, BatchStats]:
    """Normalizes x by its own statistics, activates it, and moves the running statistics."""
    shape = x.shape
    params = lay_out(params, x.ndim, spec)
    params, x, _, spec = into_ghosts(params, x, mask, spec)
    z, batch = activate_by_batch(spec, params, x)
    return z.reshape(shape), spec.update(batch_stats, batch, momentum)


@jit_step
def _infer_step(
    params: Params, batch_stats: BatchStats, x: Array, mask: None, spec: ActivatedSpec
) -> Array:
    """Normalizes x by the running statistics, and activates it."""
    params = lay_out(params, x.ndim, spec)
    mean, var = spec.expand(batch_stats["mean"]), spec.expand(batch_stats["var"])
    return activate(spec, params, x, mean, var)
