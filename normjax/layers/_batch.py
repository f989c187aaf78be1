"""Normalization by statistics of the batch: what batch norm and batch renorm have in common."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from normjax import _checks
from normjax._typing import (
    Activations,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DTypeLike,
    Mask,
    Params,
    RunningVar,
    promote,
)
from normjax.layers._activated import Activation, How, activate, activate_by_batch, check_activation
from normjax.layers._affine import normalize
from normjax.layers._arguments import admit_params, compiled
from normjax.layers._ghost import count_slices, cut, laid_out_by_the_compiler, lies_on_explicit_axes
from normjax.layers._renorm import Limits, corrected, take_limits
from normjax.statistics.moments import merge_stacked
from normjax.statistics.population import POPULATION, is_layer_by_layer
from normjax.statistics.reduction import Moments, Reduction, widen
from normjax.statistics.running import OPTIONS, check_batch_stats, update_batch_stats
from normjax.statistics.safe_moments import safe_moments
from normjax.statistics.sharing import ALONE, Sharing, share


class Settings(NamedTuple):
    """The keyword arguments of `batch_norm` and `batch_renorm` but for the mask, and what a door may allow beyond."""

    feature_axes: Axes = -1
    momentum: float | ArrayLike | None = 0.99
    epsilon: float = 1e-5
    running_var: RunningVar = "biased"
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    virtual_batch_size: int | None = None
    dtype: DTypeLike | None = None
    renorm: Limits | None = None  # None: batch norm
    activation: Activation | None = None  # None: left to the caller
    # as Flax does: one value per feature in training, a mean that turns complex with x
    drop_in: bool = False

    @property
    def function(self) -> str:
        """The name that errors begin with."""
        if self.activation is not None:
            return "activated_batch_norm"
        return "batch_norm" if self.renorm is None else "batch_renorm"


def normalize_by_batch(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    mask: Mask | None,
    settings: Settings,
) -> tuple[Activations, BatchStats]:
    """Checks the arguments and does what `batch_norm` or `batch_renorm` says."""
    function = settings.function
    train = _checks.static_train(function, train)
    x = _checks.activations(function, x)
    if settings.activation is not None:
        check_activation(function, settings.activation, x)
    mask = _checks.mask(function, mask, x.shape)
    kept = _checks.axes(function, "feature_axes", settings.feature_axes, x.shape)
    if settings.drop_in and jnp.iscomplexobj(x):
        mean = jnp.asarray(batch_stats["mean"])
        batch_stats = batch_stats | {"mean": mean.astype(promote(mean.dtype, x.dtype))}
    params = admit_params(function, params, x, kept)
    features = tuple(x.shape[axis] for axis in kept)
    check_batch_stats(function, batch_stats, features, x.dtype, settings.momentum)
    _checks.choice(function, "running_var", settings.running_var, OPTIONS)
    _checks.between(function, "epsilon", settings.epsilon, 0.0, math.inf)
    batch_stats = jax.tree.map(jnp.asarray, batch_stats)
    axes = _checks.other_axes(kept, x.ndim)
    dtype = _checks.output_dtype(function, settings.dtype, x)
    plan = _Plan(axes, float(settings.epsilon), dtype, activation=settings.activation)
    limits = None if settings.renorm is None else take_limits(settings.renorm, batch_stats)
    if not (train or is_layer_by_layer(batch_stats)):
        return _infer(params, batch_stats, x, mask, plan), batch_stats
    momentum, scheduled = settings.momentum, None
    if not isinstance(momentum, float | int | None):
        momentum, scheduled = None, momentum
    plan = plan._replace(
        momentum=momentum,
        running_var=settings.running_var,
        sharing=_sharing(x, axes, settings, one_value=is_layer_by_layer(batch_stats)),
        virtual_batch_size=settings.virtual_batch_size,
    )
    operands = params, batch_stats, x, mask, scheduled, limits
    if plan.virtual_batch_size is None or not lies_on_explicit_axes(x):
        return _train(*operands, plan)
    return laid_out_by_the_compiler(lambda *operands: _train(*operands, plan), (x, batch_stats))(
        *operands
    )


class _Plan(NamedTuple):
    """What is static about a step; hashable, so that eager calls compile it once."""

    axes: tuple[int, ...]
    epsilon: float
    dtype: jnp.dtype
    activation: Activation | None = None
    momentum: float | None = None
    running_var: RunningVar = "biased"
    sharing: Sharing = ALONE
    virtual_batch_size: int | None = None


@compiled
def _train(
    params: Params,
    batch_stats: BatchStats,
    x: Array,
    mask: Array | None,
    momentum: Array | None,
    limits: tuple[Array, Array] | None,
    plan: _Plan,
) -> tuple[Array, BatchStats]:
    """One step: normalizes x by its own statistics, and moves the running ones towards them."""
    shape, axes, size = x.shape, plan.axes, plan.virtual_batch_size
    if size is not None:
        x, mask, params, axes = cut(x, mask, params, axes, size)
    plan = plan._replace(axes=axes)
    if plan.activation is None:
        y, seen = _normalize(params, batch_stats, x, mask, limits, plan)
    else:
        y, seen = _activate(params, batch_stats, x, plan)
    if mask is None and size is None:  # a number that is known need not be asked about
        seen = seen._replace(
            count=seen.var.dtype.type(math.prod(x.shape[axis] for axis in axes) * plan.sharing.size)
        )
    batch_stats = update_batch_stats(
        batch_stats,
        seen if size is None else merge_stacked(seen),
        momentum=plan.momentum if momentum is None else momentum,
        running_var=plan.running_var,
    )
    return y.reshape(shape).astype(plan.dtype), batch_stats


def _normalize(
    params: Params,
    batch_stats: BatchStats,
    x: Array,
    mask: Array | None,
    limits: tuple[Array, Array] | None,
    plan: _Plan,
) -> tuple[Array, Moments]:
    """Normalizes by the moments of x, which it returns, too."""
    wide = widen(x)
    shift = _shift(batch_stats)
    seen = safe_moments(
        x, wide, plan.axes, shift=shift, mask=mask, sharing=plan.sharing, epsilon=plan.epsilon
    )
    if mask is not None:
        seen = _or_population(seen, batch_stats)
    mean, var = (jnp.expand_dims(statistic, plan.axes) for statistic in (seen.mean, seen.var))
    if is_layer_by_layer(batch_stats):
        mean, var = _running(batch_stats, plan)
    elif limits is not None and shift is not None:
        running = _running(batch_stats, plan)
        params = corrected(params, (mean, var), running, limits, plan.epsilon)
    return normalize(x, wide, mean, var, params, mask=mask, epsilon=plan.epsilon), seen


def _or_population(seen: Moments, batch_stats: BatchStats) -> Moments:
    """Puts the running statistics where nothing counts."""
    anything = jnp.asarray(seen.count) > 0
    mean, var = (
        batch_stats["mean"].astype(seen.mean.dtype),
        batch_stats["var"].astype(seen.var.dtype),
    )
    return Moments(
        seen.count, jnp.where(anything, seen.mean, mean), jnp.where(anything, seen.var, var)
    )


def _activate(
    params: Params, batch_stats: BatchStats, x: Array, plan: _Plan
) -> tuple[Array, Moments]:
    """Normalizes by the moments of x, which it returns, too, and activates."""
    shift, how = _shift(batch_stats), _how(plan)
    if not is_layer_by_layer(batch_stats):
        return activate_by_batch(how, params, x, shift)
    seen = safe_moments(
        x, widen(x), plan.axes, shift=shift, sharing=plan.sharing, epsilon=plan.epsilon
    )
    return activate(how, params, x, *_running(batch_stats, plan)), seen


@compiled
def _infer(
    params: Params, batch_stats: BatchStats, x: Array, mask: Array | None, plan: _Plan
) -> Array:
    mean, var = _running(batch_stats, plan)
    if plan.activation is not None:
        return activate(_how(plan), params, x, mean, var)
    return normalize(x, widen(x), mean, var, params, mask=mask, epsilon=plan.epsilon).astype(
        plan.dtype
    )


def _how(plan: _Plan) -> How:
    assert plan.activation is not None
    return How(Reduction(plan.axes, plan.sharing, plan.epsilon), plan.activation, plan.dtype)


def _shift(batch_stats: BatchStats) -> Array | None:
    """Statistics of a population owe nothing to those that they are to replace, to the last bit."""
    return None if POPULATION in batch_stats else batch_stats["mean"]


def _running(batch_stats: BatchStats, plan: _Plan) -> tuple[Array, Array]:
    """The running mean and variance with the rank of x, which is one more where it is cut into slices."""
    axes = plan.axes if plan.virtual_batch_size is None else (0, *plan.axes)
    return jnp.expand_dims(batch_stats["mean"], axes), jnp.expand_dims(batch_stats["var"], axes)


def _sharing(x: Array, axes: tuple[int, ...], settings: Settings, *, one_value: bool) -> Sharing:
    """Checks what only training asks for: bound axis names, slices that divide, more than one value per feature."""
    function = settings.function
    sharing = share(function, settings.axis_name, settings.axis_index_groups)
    slices = count_slices(function, x, axes, settings.virtual_batch_size)
    values = math.prod(x.shape[axis] for axis in axes) * sharing.size
    if values == slices > 0 and not (settings.drop_in or one_value):
        _checks.raise_error(
            function,
            "there is one value per feature: its variance is 0, and y would be the bias whatever x is",
            expected="at least 2 values per feature in training",
            got=f"1 for x.shape={x.shape}, feature_axes={settings.feature_axes!r}, "
            f"virtual_batch_size={settings.virtual_batch_size!r} and {sharing.size} device(s)",
            fix="Use a larger batch, share statistics with axis_name, or pass train=False",
        )
    return sharing
