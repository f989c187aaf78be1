"""The checks and bookkeeping that batch norm, batch renorm and activated batch norm share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from normjax import _checks, _leaves
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
from normjax.statistics.devices import ALONE, DeviceGroup, device_group
from normjax.statistics.merge import merge_over, merge_stacked
from normjax.statistics.moments import compiled_moments
from normjax.statistics.population import POPULATION, is_layer_by_layer
from normjax.statistics.running import (
    OPTIONS,
    check_batch_stats,
    check_precision,
    collect,
    unless_nonfinite,
    update,
)
from normjax.statistics.spec import Moments, Spec


@dataclass(frozen=True)
class BatchSpec(Spec):
    """The static arguments of a step that normalizes by batch statistics.

    Attributes:
      momentum: weight of the old running value; None if it is traced, or 1 - 1 / count.
      running_var: the estimate of the variance that is stored.
      virtual_batch_size: the number of examples in a ghost batch; None without ghost batches.
      skip_nonfinite: whether to keep the running statistics unchanged if the statistics of the
        batch are not finite.
      sharers: the devices whose ghost batches are merged for the running statistics.
    """

    momentum: float | None = None
    running_var: RunningVar = "biased"
    virtual_batch_size: int | None = None
    skip_nonfinite: bool = False
    sharers: DeviceGroup = ALONE

    def update(self, batch_stats: BatchStats, batch: Moments, momentum: Array | None) -> BatchStats:
        """Updates the running statistics by the batch, with all its ghost batches merged."""
        if self.virtual_batch_size is not None:
            batch = merge_over(self.sharers, merge_stacked(batch))
        if self.skip_nonfinite:
            batch = unless_nonfinite(batch)
        weight = self.momentum if momentum is None else momentum
        return update(batch_stats, batch, weight, self.running_var)


SomeSpec = TypeVar("SomeSpec", bound=BatchSpec)


class BatchStep(NamedTuple):
    """The checked arguments of a step."""

    params: Params
    batch_stats: BatchStats
    x: Array
    train: bool
    mask: Array | None
    momentum: Array | None
    spec: BatchSpec


def check_batch_step(
    function: str,
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
    one_value: bool = False,
    make_spec: Callable[..., BatchSpec] = BatchSpec,
) -> BatchStep:
    """Checks the arguments that the three layers share.

    `one_value` allows training on a single value per feature, as Flax does; y is then the bias.
    """
    train = _checks.static_train(function, train)
    x = _checks.activations(function, x)
    feature_axes = _checks.axes(function, "feature_axes", feature_axes, x.shape)
    axes = _checks.other_axes(feature_axes, x.ndim)
    features = _leaves.params(function, params, x, feature_axes, axes)
    check_batch_stats(function, batch_stats, features, x.dtype, momentum)
    if running_var not in OPTIONS:
        _checks.choice(function, "running_var", running_var, OPTIONS)
    epsilon = _checks.number(function, "epsilon", epsilon, 0.0, math.inf)
    static = momentum is None or isinstance(momentum, float | int)
    spec = make_spec(
        axes=axes,
        feature_axes=feature_axes,
        epsilon=epsilon,
        dtype=x.dtype if dtype is None else _checks.output_dtype(function, dtype, x),
        momentum=momentum if static else None,
        running_var=running_var,
        scale_offset=_checks.number(function, "scale_offset", scale_offset, -math.inf, math.inf),
        skip_nonfinite=_checks.boolean(function, "skip_nonfinite", skip_nonfinite),
    )
    mask = None if mask is None else _checks.mask(function, mask, x.shape)
    traced = None if static else jnp.asarray(momentum)
    step = BatchStep(params, batch_stats, x, train, mask, traced, spec)
    if not (train or POPULATION in batch_stats):
        return step
    check_precision(function, batch_stats)
    if axis_name is not None or axis_index_groups is not None:
        spec = replace(spec, devices=device_group(function, axis_name, axis_index_groups))
    if virtual_batch_size is not None:
        _check_ghosts(function, x, axes, virtual_batch_size)
        spec = replace(spec, virtual_batch_size=virtual_batch_size)
    if not one_value:
        _check_values(function, x, spec, layer_by_layer=is_layer_by_layer(batch_stats))
    return step._replace(spec=spec)


def _check_ghosts(function: str, x: Array, axes: tuple[int, ...], size: int) -> None:
    """Raises an error if the examples cannot be divided into ghost batches of `size`."""
    examples, positive = x.shape[0], _checks.positive_int(size)
    if positive is None or examples % positive:
        _checks.raise_error(
            function,
            "the examples cannot be divided into ghost batches",
            expected="a positive virtual_batch_size that divides the number of examples",
            got=f"virtual_batch_size={size!r} and {examples} examples for x.shape={x.shape}",
            fix="Choose a divisor, or drop the last, smaller batch",
        )
    if 0 not in axes:
        _checks.raise_error(
            function,
            "virtual_batch_size divides axis 0, which is a feature axis",
            expected="examples along axis 0",
            got=f"virtual_batch_size={size} and reduced axes {axes} for x.shape={x.shape}",
            fix="Move the examples to axis 0: jnp.moveaxis(x, batch_axis, 0)",
        )


def _check_values(function: str, x: Array, spec: BatchSpec, *, layer_by_layer: bool) -> None:
    """Raises an error for a single value per feature, unless the layer uses other statistics."""
    size = spec.virtual_batch_size
    slices = 1 if size is None else x.shape[0] // size
    count = (spec if size is None else replace(spec, devices=ALONE)).count(x)
    known = isinstance(count, float)
    if layer_by_layer or not (known and count == slices and slices):
        return
    _checks.raise_error(
        function,
        "there is only one value per feature: the variance is 0, so y is the bias for every x",
        expected="at least 2 values per feature in training",
        got=f"1 for x.shape={x.shape}, feature_axes={spec.feature_axes}, "
        f"virtual_batch_size={size!r} and {spec.devices.size} device(s)",
        fix="Use a larger batch, share statistics with axis_name, or pass train=False",
    )


def take_step(
    step: BatchStep,
    train_step: Callable[..., tuple[Array, BatchStats]],
    infer_step: Callable[..., Array],
    *extra: Any,
) -> tuple[Array, BatchStats]:
    """Takes a step of training or inference; `extra` are more operands of the training step."""
    params, batch_stats, x, train, mask, momentum, spec = step
    if POPULATION in batch_stats:
        return _collecting_step(step, train_step, infer_step, *extra)
    if not train:
        return infer_step(params, batch_stats, x, mask, spec), batch_stats
    operands = params, batch_stats, x, mask, momentum, *extra
    return train_step(*operands, spec)


def _collecting_step(
    step: BatchStep,
    train_step: Callable[..., tuple[Array, BatchStats]],
    infer_step: Callable[..., Array],
    *extra: Any,
) -> tuple[Array, BatchStats]:
    """Adds the moments of x to the leaf that collects them; running statistics do not change."""
    params, batch_stats, x, train, mask, momentum, spec = step
    layer_by_layer = is_layer_by_layer(batch_stats)
    running = {leaf: value for leaf, value in batch_stats.items() if leaf != POPULATION}
    if train and not layer_by_layer:
        plain = step._replace(batch_stats=running)
        y, _ = take_step(plain, train_step, infer_step, *extra)
    else:
        y = infer_step(params, running, x, mask, spec)
    if not (train or layer_by_layer):
        return y, batch_stats
    batch = compiled_moments(spec, x, mask)
    if spec.skip_nonfinite:
        batch = unless_nonfinite(batch)
    weight = spec.momentum if momentum is None else momentum
    return y, collect(batch_stats, batch, weight, spec.running_var)


def into_ghosts(
    params: Params, x: Array, mask: Array | None, spec: SomeSpec
) -> tuple[Params, Array, Array | None, SomeSpec]:
    """Splits axis 0 into ghost batches along a new axis 0, which is treated as a feature axis.

    A ghost batch lies on one device: it has `virtual_batch_size` examples with `axis_name`, too.
    Hoffer, Hubara & Soudry (2017), Algorithm 1. Params and mask have the rank of x.
    """
    size = spec.virtual_batch_size
    if size is None:
        return params, x, mask, spec

    def cut(part: Array) -> Array:
        if part.shape[0] == 1:
            return part[None]
        return part.reshape(part.shape[0] // size, size, *part.shape[1:])

    params, x, mask = jax.tree.map(cut, (params, x, mask))
    axes = tuple([axis + 1 for axis in spec.axes])
    return params, x, mask, replace(spec, axes=axes, devices=ALONE, sharers=spec.devices)


def batch_or_running(
    batch: Moments, batch_stats: BatchStats, spec: BatchSpec
) -> tuple[Array, Array]:
    """Returns batch mean and variance, or running ones if no element counts, with the rank of x."""
    if isinstance(batch.count, float):
        return spec.expand(batch.mean), spec.expand(batch.var)
    counted = jnp.asarray(batch.count) > 0
    mean, var = running_like(batch, batch_stats)
    mean, var = jnp.where(counted, batch.mean, mean), jnp.where(counted, batch.var, var)
    return spec.expand(mean), spec.expand(var)


def running_like(batch: Moments, batch_stats: BatchStats) -> tuple[Array, Array]:
    """Returns the running statistics in the dtype and rank of the batch statistics."""
    new_axes = tuple(range(batch.var.ndim - jnp.ndim(batch_stats["var"])))
    mean, var = batch_stats["mean"], batch_stats["var"]
    mean = jnp.expand_dims(mean.astype(batch.mean.dtype), new_axes)
    return mean, jnp.expand_dims(var.astype(batch.var.dtype), new_axes)


def with_complex_mean(batch_stats: BatchStats, x: Array) -> BatchStats:
    """Makes the running mean complex if x is complex, as Flax does."""
    if not jnp.iscomplexobj(x):
        return batch_stats
    mean = jnp.asarray(batch_stats["mean"])
    return batch_stats | {"mean": mean.astype(promote(mean.dtype, x.dtype))}
