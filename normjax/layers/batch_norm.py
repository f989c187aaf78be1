"""Batch normalization (Ioffe & Szegedy, 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import ones, zeros
from jaxtyping import Array, ArrayLike

from normjax import _checks
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
    promote,
)
from normjax.layers._affine import init_params, normalize
from normjax.layers._ghost import count_slices, cut
from normjax.statistics.moments import merge_stacked
from normjax.statistics.running import (
    OPTIONS,
    check_batch_stats,
    init_batch_stats,
    update_batch_stats,
)
from normjax.statistics.safe_moments import STATISTICS, Moments, safe_moments, widen
from normjax.statistics.sharing import ALONE, Sharing, share


def batch_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = ones,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    count: bool = False,
) -> tuple[Params, BatchStats]:
    """Returns the parameters and running statistics that `batch_norm` starts from.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the order of the axes of x.
      use_scale: whether there is a scale. A following linear layer, also behind a ReLU, can do without it.
      use_bias: whether there is a bias.
      scale_init: makes the scale; zeros for the last layer of a residual branch (Goyal et al. 2017, section 5.1).
      bias_init: makes the bias.
      key: for a random initializer; not needed otherwise.
      param_dtype: of scale and bias. The statistics are kept in it too, but in float32 at the least.
      count: whether to count batches, as the cumulative mode (`momentum=None`) requires.

    Returns:
      `params`: a dict of `scale` (ones) and `bias` (zeros), each `(*num_features)`.
      `batch_stats`: a dict of `mean` (zeros) and `var` (ones), each `(*num_features)`, and `count` (0, int32) if asked
      for.

    Raises:
      ValueError: for a size that is not positive. TypeError: for an integer `param_dtype`, or a random initializer
        without a key.

    Example:
      >>> import normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(3, use_bias=False)
      >>> print(params["scale"], batch_stats["mean"], batch_stats["var"])
      [1. 1. 1.] [0. 0. 0.] [1. 1. 1.]
    """
    sizes = _checks.sizes("batch_norm_init", "num_features", num_features)
    makers = {"scale": scale_init} if use_scale else {}
    makers |= {"bias": bias_init} if use_bias else {}
    params = init_params("batch_norm_init", sizes, makers, key, param_dtype)
    return params, init_batch_stats(sizes, param_dtype, count=count)


class Settings(NamedTuple):
    """The keyword arguments of `batch_norm` but for the mask, and what a door may allow beyond them."""

    feature_axes: Axes = -1
    momentum: float | ArrayLike | None = 0.99
    epsilon: float = 1e-5
    running_var: RunningVar = "biased"
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    virtual_batch_size: int | None = None
    dtype: DTypeLike | None = None
    drop_in: bool = False  # as Flax does: one value per feature in training, a mean that turns complex with x


def batch_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    feature_axes: Axes = -1,
    momentum: float | ArrayLike | None = 0.99,
    epsilon: float = 1e-5,
    running_var: RunningVar = "biased",
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    virtual_batch_size: int | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Activations, BatchStats]:
    r"""Normalizes each feature by the batch's statistics in training, by the population's at inference.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training the mean and the biased variance are those of the batch, over all axes but the features, and the running
    statistics move a step towards them: `new = momentum * old + (1 - momentum) * batch`. At inference the running
    statistics stand for them, and come back as they were. Use it in networks trained on batches of about 16 examples or
    more; share statistics over devices (`axis_name`) where each device has fewer.

    Args:
      params: dict of `scale` and `bias`, each `(*features)`; a leaf that is absent is left out of the formula.
      batch_stats: dict of `mean` and `var`, each `(*features)`, and maybe `count`.
      x: floating-point or complex, any rank >= 1, such as `(batch, height, width, features)`.
      train: Python bool: which of the two to compile.
      feature_axes: the axes that keep statistics, scale and bias of their own. Leaves have the sizes of these axes in
        ascending order, in whatever order they are given here.
      momentum: weight of the old running value. None: the mean over all batches so far (needs `count`).
      epsilon: added to the variance.
      running_var: which estimate of the variance is stored, "biased" (Flax, Keras) or "unbiased" (PyTorch, the paper).
      mask: bool, broadcastable to x: True where an element counts. Elements that do not count are normalized like the
        others but leave no trace in the statistics; where one is NaN or infinite, y is the bias, a constant. Features
        of which nothing counts use and keep their running statistics.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) over which the statistics are shared, in training. Under
        plain jit with sharded x they are those of the global batch without it.
      axis_index_groups: groups of indices of that axis that share, as in `jax.lax.psum`.
      virtual_batch_size: ghost batches: in training, normalizes each slice of that many examples of axis 0 by
        statistics of its own; the running statistics take in the whole batch.
      dtype: of y; None for that of x.

    Returns:
      `y`, of x's shape, and the new `batch_stats`, of the old structure, shapes and dtypes. Statistics and y are
      computed in at least float32 and rounded once; the variance is safe, on the first step too: right to 1e-5 of
      `var + epsilon`.

    Raises:
      ValueError, TypeError, NameError: at trace time, for whatever does not fit: axes, leaves, dtypes, a mask, an axis
        name that is not in scope, a traced `train`, one value per feature in training.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(2)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, batch_stats = nj.batch_norm(params, batch_stats, x, train=True, momentum=0.5)
      >>> print(y.round(3), batch_stats["mean"], batch_stats["var"])
      [[-1. -1.]
       [ 1.  1.]] [ 1. 10.] [ 1.  50.5]

    References:
      Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift"
      (ICML 2015), Algorithms 1 and 2. Ghost batches: Hoffer, Hubara & Soudry (2017), Algorithm 1.
    """
    settings = Settings(
        feature_axes, momentum, epsilon, running_var, axis_name, axis_index_groups, virtual_batch_size, dtype
    )
    return apply_batch_norm(params, batch_stats, x, train, mask, settings)


@jax.named_scope("batch_norm")
def apply_batch_norm(
    params: Params, batch_stats: BatchStats, x: Activations, train: bool, mask: Mask | None, settings: Settings
) -> tuple[Activations, BatchStats]:
    """Checks the arguments and does what `batch_norm` says."""
    train = _checks.static_train("batch_norm", train)
    x = _checks.activations("batch_norm", x)
    mask = _checks.mask("batch_norm", mask, x.shape)
    kept = _checks.axes("batch_norm", "feature_axes", settings.feature_axes, x.shape)
    if settings.drop_in and jnp.iscomplexobj(x):
        mean = jnp.asarray(batch_stats["mean"])
        batch_stats = batch_stats | {"mean": mean.astype(promote(mean.dtype, x.dtype))}
    _check_state(params, batch_stats, x, tuple(x.shape[axis] for axis in kept), settings)
    dtype = _checks.output_dtype("batch_norm", settings.dtype, x)
    params, batch_stats = jax.tree.map(jnp.asarray, (params, batch_stats))
    axes = tuple(axis for axis in range(x.ndim) if axis not in kept)
    plan = _Plan(axes, float(settings.epsilon), dtype)
    if not train:
        return _infer(params, batch_stats, x, mask, plan), batch_stats
    momentum, scheduled = settings.momentum, None
    if not isinstance(momentum, float | int | None):
        momentum, scheduled = None, momentum
    plan = plan._replace(
        momentum=momentum,
        running_var=settings.running_var,
        sharing=_sharing(x, axes, settings),
        virtual_batch_size=settings.virtual_batch_size,
    )
    return _train(params, batch_stats, x, mask, scheduled, plan)


class _Plan(NamedTuple):
    """What is static about a step; hashable, so that eager calls compile it once."""

    axes: tuple[int, ...]
    epsilon: float
    dtype: jnp.dtype
    momentum: float | None = None
    running_var: RunningVar = "biased"
    sharing: Sharing = ALONE
    virtual_batch_size: int | None = None


@partial(jax.jit, static_argnames="plan", inline=True)
@partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names(STATISTICS),
    static_argnums=5,
)
def _train(
    params: Params, batch_stats: BatchStats, x: Array, mask: Array | None, momentum: Array | None, plan: _Plan
) -> tuple[Array, BatchStats]:
    """One step; for the backward pass it keeps x as it came and the statistics, and nothing else of x's size."""
    shape, axes, size = x.shape, plan.axes, plan.virtual_batch_size
    if size is not None:
        x, mask, axes = cut(x, mask, axes, size)
    wide = widen(x)
    seen = safe_moments(x, wide, axes, shift=batch_stats["mean"], mask=mask, sharing=plan.sharing, epsilon=plan.epsilon)
    if mask is not None:
        population = batch_stats["var"].astype(seen.var.dtype)
        seen = seen._replace(var=jnp.where(jnp.asarray(seen.count) > 0, seen.var, population))
    y = _normalize(params, seen, wide, mask, plan._replace(axes=axes)).reshape(shape)
    batch_stats = update_batch_stats(
        batch_stats,
        seen if size is None else merge_stacked(seen),
        momentum=plan.momentum if momentum is None else momentum,
        running_var=plan.running_var,
    )
    return y, batch_stats


@partial(jax.jit, static_argnames="plan", inline=True)
@partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def _infer(params: Params, batch_stats: BatchStats, x: Array, mask: Array | None, plan: _Plan) -> Array:
    return _normalize(params, Moments(0, batch_stats["mean"], batch_stats["var"]), widen(x), mask, plan)


def _normalize(params: Params, statistics: Moments, wide: Array, mask: Array | None, plan: _Plan) -> Array:
    def scaled(wide: Array) -> Array:
        return normalize(wide, statistics.mean, statistics.var, params, axes=plan.axes, epsilon=plan.epsilon)

    if mask is None:
        return scaled(wide).astype(plan.dtype)
    # A NaN times a gradient of zero is NaN: it must not get as far as the derivative of the scale.
    sound = mask | jnp.isfinite(wide)
    mean = jnp.expand_dims(lax.stop_gradient(statistics.mean), plan.axes).astype(wide.dtype)
    y = scaled(jnp.where(sound, wide, mean)).astype(plan.dtype)
    return jnp.where(sound, y, lax.stop_gradient(y))


def _sharing(x: Array, axes: tuple[int, ...], settings: Settings) -> Sharing:
    """Checks what only training asks for: bound axis names, slices that divide, more than one value per feature."""
    sharing = share("batch_norm", settings.axis_name, settings.axis_index_groups)
    slices = count_slices("batch_norm", x, axes, settings.virtual_batch_size)
    values = math.prod(x.shape[axis] for axis in axes) * sharing.size
    if values == slices > 0 and not settings.drop_in:
        _checks.refuse(
            "batch_norm",
            "there is one value per feature: its variance is 0, and y would be the bias whatever x is",
            expected="at least 2 values per feature in training",
            got=f"1 for x.shape={x.shape}, feature_axes={settings.feature_axes!r}, "
            f"virtual_batch_size={settings.virtual_batch_size!r} and {sharing.size} device(s)",
            fix="Use a larger batch, share statistics with axis_name, or pass train=False",
        )
    return sharing


def _check_state(
    params: Params, batch_stats: BatchStats, x: Array, features: tuple[int, ...], settings: Settings
) -> None:
    """Checks leaves and options against x."""
    _checks.leaves(
        "batch_norm", "params", params, shape=features, dtype=x.dtype, required=set(), optional={"scale", "bias"}
    )
    check_batch_stats("batch_norm", batch_stats, features, x.dtype, settings.momentum)
    _checks.choice("batch_norm", "running_var", settings.running_var, OPTIONS)
    _checks.between("batch_norm", "epsilon", settings.epsilon, 0.0, math.inf)
