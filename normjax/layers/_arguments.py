"""What every layer asks of its arguments, and how its step is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from normjax import _checks
from normjax._leaves import SCALARS, check_leaves
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
from normjax.layers._affine import lay_out
from normjax.statistics.reduction import INPUT, OUTPUT, STATISTICS, Reduction, named
from normjax.statistics.sharing import share


class Given(NamedTuple):
    """The checked arguments of a layer without statistics of the batch.

    Attributes:
      params: with the rank of x.
      x: an array.
      mask: None, or with the rank of x.
      feature_axes: not negative, ascending.
      dtype: of y.
    """

    params: Params
    x: Array
    mask: Array | None
    feature_axes: tuple[int, ...]
    dtype: Any


def admit(
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
) -> Given:
    """Checks what all layers without statistics of the batch have in common."""
    _checks.static_train(function, train)
    x = _checks.activations(function, x, name)
    mask = _checks.mask(function, mask, x.shape)
    kept = _checks.axes(function, "feature_axes", feature_axes, x.shape)
    check_leaves(function, "batch_stats", batch_stats, shape=(), dtype=x.dtype)
    params = admit_params(function, params, x, kept, leaves=leaves, required=required)
    return Given(params, x, mask, kept, _checks.output_dtype(function, dtype, x))


def admit_params(
    function: str,
    params: Params,
    x: Array,
    feature_axes: tuple[int, ...],
    *,
    leaves: Collection[str] = ("scale", "bias"),
    required: Collection[str] = (),
) -> Params:
    """Checks `params` against x and returns them with its rank."""
    check_leaves(
        function,
        "params",
        params,
        shape=tuple(x.shape[axis] for axis in feature_axes),
        dtype=x.dtype,
        required=required,
        optional=leaves,
        leading=tuple(size for axis, size in enumerate(x.shape) if axis not in feature_axes),
    )
    return {
        leaf: jnp.asarray(value)
        if leaf in SCALARS
        else lay_out(jnp.asarray(value), x.ndim, feature_axes)
        for leaf, value in params.items()
    }


def one_feature_axis(function: str, given: Given) -> int:
    """Returns the feature axis of a layer that has exactly one."""
    if len(given.feature_axes) != 1:
        _checks.raise_error(
            function,
            "there must be one feature axis",
            expected="an int, or one of them",
            got=f"feature_axes={given.feature_axes} for x.shape={given.x.shape}",
            fix="Name the axis of the channels, as in -1",
        )
    return given.feature_axes[0]


def axes_within_examples(
    function: str, given: Given, reduction_axes: Axes | None
) -> tuple[int, ...]:
    """Returns the axes to reduce, all but the first and the features by default; refuses the axis of the examples."""
    kept, shape = given.feature_axes, given.x.shape
    if reduction_axes is None:
        axes = tuple(axis for axis in range(1, len(shape)) if axis not in kept)
    else:
        axes = _checks.axes(function, "reduction_axes", reduction_axes, shape)
    got = f"reduction_axes={reduction_axes} and feature_axes={kept} for x.shape={shape}"
    if 0 in axes or 0 in kept:
        _checks.raise_error(
            function,
            "axis 0 holds the examples, and the statistics are of each by itself",
            expected="reduction_axes and feature_axes without axis 0",
            got=got,
            fix="Move the examples to axis 0, or use batch_norm to reduce over them",
        )
    if set(axes) & set(kept):
        _checks.raise_error(
            function,
            "an axis is both reduced and a feature",
            expected="reduction_axes and feature_axes that have no axis in common",
            got=got,
            fix="Use layer_norm to reduce over features",
        )
    return axes


def more_than_one_value(
    function: str, x: Array, axes: tuple[int, ...], *, devices: int = 1, members: int = 1
) -> None:
    """Refuses statistics over one value: its variance is 0, and y would be the bias."""
    if math.prod(x.shape[axis] for axis in axes) * devices * members == 1:
        _checks.raise_error(
            function,
            "each statistic is over one value: its variance is 0, and y would be the bias whatever x is",
            expected="at least 2 values for each mean and variance in training",
            got=f"1 for x.shape={x.shape}, reduced over axes {axes}, {members} channel(s) and {devices} device(s)",
            fix="Reduce over more axes, or use rms_norm",
        )


def compiled(step: Callable) -> Callable:
    """Compiles a step once for each value of its last argument, which is static.

    For the backward pass it keeps its arguments as they came (those that are needed) and what the
    step names. The name of x is for policies of `jax.checkpoint` around the layer, such as
    `remat_policy`.
    """
    names = step.__code__.co_varnames[: step.__code__.co_argcount]
    last = len(names) - 1

    def with_named_input(*operands: Any) -> Any:
        return step(
            *(
                named(given, INPUT) if name == "x" else given
                for name, given in zip(names, operands, strict=True)
            )
        )

    policy = jax.checkpoint_policies.save_only_these_names(STATISTICS, OUTPUT)
    lean = jax.checkpoint(with_named_input, prevent_cse=False, policy=policy, static_argnums=last)
    return jax.jit(lean, static_argnums=last, inline=True)


def compiled_within_examples(step: Callable) -> Callable:
    """Compiles a step `(params, x, mask, plan)`, where plan.how reduces x within its examples, without axes of size 1.

    On CPUs XLA takes `(1, time, features)` for a batch of matrices, and sums over features of the
    derivative for products of them, which took 6 times as long.
    """

    def without_ones(params: Params, x: Array, mask: Array | None, plan: Any) -> Array:
        grouped = {plan.how.groups[0]} if plan.how.groups else set()
        ones = tuple(
            i for i, size in enumerate(x.shape) if size == 1 and i not in {*plan.how.axes, *grouped}
        )
        operands = jax.tree.map(lambda operand: operand.squeeze(ones), (params, x, mask))
        return step(*operands, plan._replace(how=plan.how.without(ones))).reshape(x.shape)

    return compiled(without_ones)


def reduction(
    function: str,
    axes: tuple[int, ...],
    epsilon: float,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
) -> Reduction:
    """Checks epsilon and the names of mapped axes."""
    _checks.between(function, "epsilon", epsilon, 0.0, math.inf)
    return Reduction(axes, share(function, axis_name, axis_index_groups), float(epsilon))
