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
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias.
      scale_init: initializer of the scale; avoid zeros, because x cannot be recovered accurately
        from the output then.
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
    r"""Applies batch norm and an invertible activation; the backward pass needs the output, not x.

    .. math:: z = \varphi(y), \qquad
              y = (|o + \gamma| + \epsilon) \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Use it to save memory, in place of `batch_norm` and the activation after it. The next layer
    stores z for its backward pass anyway. This layer recovers the normalized input from z by
    inverting the activation and the affine map, so it stores no other array of x's size. Do not use
    it as the last layer of a residual branch with a scale that starts at zero: see `params`.

    Args:
      params: dict of `scale` and `bias`, as in `batch_norm`. The gain is `|o + scale| + epsilon`,
        because the inverse divides by it. Its derivative is 1 where `o + scale` is 0. The backward
        pass magnifies the rounding of z by `(|y| + |bias|) / gain`: keep gains within a few orders
        of magnitude of 1, especially in bfloat16.
      batch_stats: dict of `mean` and `var`, each `(*features)`, and maybe `count`.
      x: floating-point, real, any rank >= 1, such as `(batch, height, width, features)`.
      train: Python bool. It selects training or inference at trace time.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      activation: "leaky_relu", "elu" or "identity". If an ELU was rounded to -1 (y below -16 in
        float32, -5.5 in bfloat16), the gradient of x is the one at that bound.
      negative_slope: slope of the leaky ReLU for negative inputs; must be positive.
      feature_axes: as in `batch_norm`, like all arguments below. There is no `mask`; use
        `batch_norm` if you need one.
      momentum: weight of the old running value.
      epsilon: added to the variance, and to `|scale|`.
      running_var: the estimate of the variance that is stored, "biased" or "unbiased".
      axis_name: mapped axis or axes over which the statistics are all-reduced in training, with one
        collective in the forward pass and one in the backward pass.
      axis_index_groups: groups of indices of that axis; each group shares statistics.
      virtual_batch_size: ghost batches of that many examples, in training.
      skip_nonfinite: whether to keep the running statistics unchanged if the statistics of the
        batch are not finite.
      dtype: dtype of z, which is also what the backward pass stores; None for the dtype of x.

    Returns:
      `z`, with the shape of x, and the new `batch_stats`, with the structure, shapes and dtypes of
      the old ones. z is computed in at least float32 and rounded once. Gradients of every order, in
      forward and reverse mode, are exact up to rounding, including the rounding of z to `dtype`.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an activation that cannot be inverted,
        for a complex x, and whenever `batch_norm` raises them.

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
    """Normalizes x by batch statistics, activates it, and updates the running statistics."""
    shape = x.shape
    params = lay_out(params, x.ndim, spec)
    params, x, _, spec = into_ghosts(params, x, mask, spec)
    z, batch = activate_by_batch(spec, params, x)
    return z.reshape(shape), spec.update(batch_stats, batch, momentum)


@jit_step
def _infer_step(
    params: Params, batch_stats: BatchStats, x: Array, mask: None, spec: ActivatedSpec
) -> Array:
    """Normalizes x by the running statistics, and applies the activation."""
    params = lay_out(params, x.ndim, spec)
    mean, var = spec.expand(batch_stats["mean"]), spec.expand(batch_stats["var"])
    return activate(spec, params, x, mean, var)
