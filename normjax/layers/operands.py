"""Checks the arguments of layers without batch statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jaxtyping import Array

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
)
from normjax.statistics.devices import device_group
from normjax.statistics.per_example import ExampleSpec
from normjax.statistics.spec import Spec


class Operands(NamedTuple):
    """The checked arguments of a layer.

    Attributes:
      params: as given.
      x: an array.
      mask: None, or an array with the rank of x.
      feature_axes: not negative, ascending.
      dtype: dtype of y.
      axes: the result of `find_axes`.
    """

    params: Params
    x: Array
    mask: Array | None
    feature_axes: tuple[int, ...]
    dtype: Any
    axes: tuple[int, ...] = ()


def check_operands(
    function: str,
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    feature_axes: Axes,
    mask: Mask | None = None,
    dtype: DTypeLike | None = None,
    leaves: Collection[str] = ("scale", "bias"),
    required: Collection[str] = (),
    name: str = "x",
    find_axes: Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...]] | None = None,
) -> Operands:
    """Checks the arguments that all layers without batch statistics share.

    `find_axes(feature_axes, shape)` raises an error for axes that the layer does not support. It
    runs before the check of the leaves, which would fail with a less useful error.
    """
    _checks.static_train(function, train)
    x = _checks.activations(function, x, name)
    mask = _checks.mask(function, mask, x.shape)
    feature_axes = _checks.axes(function, "feature_axes", feature_axes, x.shape)
    axes = () if find_axes is None else find_axes(feature_axes, x.shape)
    _leaves.leaves(function, "batch_stats", batch_stats, shape=(), dtype=x.dtype)
    others = _checks.other_axes(feature_axes, x.ndim)
    _leaves.params(function, params, x, feature_axes, others, known=leaves, required=required)
    dtype = _checks.output_dtype(function, dtype, x)
    return Operands(params, x, mask, feature_axes, dtype, axes)


def check_spec(
    function: str,
    operands: Operands,
    axes: tuple[int, ...],
    epsilon: float,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    make_spec: type[ExampleSpec] = ExampleSpec,
    scale_offset: float = 0.0,
    **static: Any,
) -> Any:
    """Checks numbers and names of mapped axes, and returns the static arguments of the step."""
    epsilon = _checks.number(function, "epsilon", epsilon, 0.0, math.inf)
    devices = device_group(function, axis_name, axis_index_groups)
    return make_spec(
        axes=axes,
        feature_axes=operands.feature_axes,
        devices=devices,
        epsilon=epsilon,
        dtype=operands.dtype,
        scale_offset=_checks.number(function, "scale_offset", scale_offset, -math.inf, math.inf),
        **static,
    )


def one_feature_axis(
    function: str, feature_axes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns the feature axis; raises an error unless there is exactly one."""
    if len(feature_axes) != 1:
        _checks.raise_error(
            function,
            "there is not exactly one feature axis",
            expected="an int, or a sequence of one int",
            got=f"feature_axes={feature_axes} for x.shape={shape}",
            fix="Pass the channel axis, such as feature_axes=-1",
        )
    return feature_axes


def axes_within_examples(
    function: str,
    reduction_axes: Axes | None,
    feature_axes: tuple[int, ...],
    shape: tuple[int, ...],
) -> tuple[int, ...]:
    """Returns the axes to reduce; by default all but axis 0 and the feature axes.

    Raises an error for axis 0, which holds the examples.
    """
    kept = feature_axes
    if reduction_axes is None:
        axes = tuple(axis for axis in range(1, len(shape)) if axis not in kept)
    else:
        axes = _checks.axes(function, "reduction_axes", reduction_axes, shape)
    got = f"reduction_axes={reduction_axes} and feature_axes={kept} for x.shape={shape}"
    if 0 in axes or 0 in kept:
        _checks.raise_error(
            function,
            "axis 0 holds the examples, and statistics are computed for each example by itself",
            expected="reduction_axes and feature_axes without axis 0",
            got=got,
            fix="Move the examples to axis 0, or use batch_norm to reduce over them",
        )
    if set(axes) & set(kept):
        _checks.raise_error(
            function,
            "an axis is both reduced and a feature",
            expected="reduction_axes and feature_axes without a common axis",
            got=got,
            fix="Use layer_norm to reduce over features",
        )
    return axes


def more_than_one_value(function: str, x: Array, spec: Spec) -> None:
    """Raises an error for statistics over a single value, whose variance is 0."""
    count = spec.count(x)
    if isinstance(count, float) and count == 1:
        members = 1 if spec.groups is None else spec.groups[1]
        _checks.raise_error(
            function,
            "each statistic is over one value: the variance is 0, so y is the bias for every x",
            expected="at least 2 values for each mean and variance in training",
            got=f"1 for x.shape={x.shape}, reduced over axes {spec.axes}, {members} channel(s) "
            f"and {spec.devices.size} device(s)",
            fix="Reduce over more axes, or use rms_norm",
        )
