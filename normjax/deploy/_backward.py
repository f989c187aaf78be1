"""Folds batch norms into the linear layers before them.

The affine map of a batch norm is carried from its output back to the outputs of linear layers:
through other scales, shifts and layouts, sums, concatenation, slices, sums over pixels, and maxima
if the map does not change the order. The search does not depend on how a batch norm is written.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from normjax._jaxpr import Op
from normjax.deploy._graph import LINEAR, Graph, Linear, before, name_of
from normjax.deploy._layout import Affine, Unfoldable, feature_axes, laid_back, unchanged

SLICES = ("slice", "split")
SUMS = ("add", "sub", "add_any")
MAXIMA = ("reduce_window_max", "reduce_max")
TOTALS = ("reduce_window_sum", "reduce_sum")
THROUGH = (*SLICES, *MAXIMA, *TOTALS)
Outputs = tuple[int, ...]  # the outputs of an operation, which identify it


class Region(NamedTuple):
    """The operations between linear layers and the end of a batch norm.

    Attributes:
      root: the output of the batch norm.
      ops: the operations by their outputs, in program order.
      sinks: the linear layers.
    """

    root: int
    ops: dict[Outputs, Op]
    sinks: list[Linear]


def pull(graph: Graph, root: int) -> Region:
    """Returns the region between linear layers and a value; raises `Unfoldable` with a reason."""
    ops: dict[Outputs, Op] = {}
    sinks: list[Linear] = []
    todo = [root]
    try:
        while todo:
            _visit(graph, todo, ops, sinks)
    except Unfoldable as reason:
        joins = [op for op in ops.values() if len(graph.data(op)) > 1]
        if not joins:
            raise
        what = f"its input comes from {name_of(joins[0])}, not from a linear layer"
        raise Unfoldable(f"{what} alone: {reason}") from None
    for op in ops.values():
        for number in graph.data(op):
            if not _only_user(graph, number, op):
                kernel = "/".join(sinks[0].path)
                raise Unfoldable(f"the output of {kernel} is also used elsewhere")
    order = {op.outputs: op for op in graph.program.ops if op.outputs in ops}
    return Region(root, order, sinks)


def _visit(graph: Graph, todo: list[int], ops: dict[Outputs, Op], sinks: list[Linear]) -> None:
    """Visits one value, and records which values to visit next."""
    op = graph.makers.get(todo.pop())
    if op is None:
        raise Unfoldable("it comes first: its input is the model's")
    if op.name in LINEAR:
        sinks.append(graph.linear(op))
    elif op.outputs not in ops:
        data = _inputs(graph, op)
        ops[op.outputs] = op
        todo += reversed(data)


def _inputs(graph: Graph, op: Op) -> list[int]:
    data = graph.data(op)
    if graph.passes(op) or graph.is_step(op) or (op.name in THROUGH and len(data) == 1):
        return data
    if op.name in ("concatenate", *SUMS) and len(data) == len(op.inputs):
        return data
    raise Unfoldable(f"its input comes from {name_of(op)}, not from a linear layer")


def _only_user(graph: Graph, number: int, op: Op) -> bool:
    """Returns whether a value has a single reader, or all of its readers take parts of it."""
    uses = graph.users[number]
    if uses == [op] or op.name not in SLICES:
        return uses == [op]
    taken: list[list[tuple[Any, Any]]] = []
    for user in uses:
        if user is None or user.name != "slice":
            return False
        starts, stops = user.params["start_indices"], user.params["limit_indices"]
        taken.append(list(zip(starts, stops, strict=True)))
    return all(
        any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(one, other, strict=True))
        for i, one in enumerate(taken)
        for other in taken[:i]
    )


def carried_back(
    graph: Graph, region: Region, absorbed: frozenset[Outputs], only: Outputs | None = None
) -> list[Affine]:
    """Returns the affine map of each linear layer's output that replaces the batch norm.

    Args:
      graph: the program.
      region: the operations in between.
      absorbed: steps that are already part of kernels, and have no further effect.
      only: the only step that has an effect, if given.
    """
    state = {region.root: unchanged(len(graph.shape(region.root)))}
    for op in reversed(region.ops.values()):
        if graph.is_step(op):
            does = op.outputs not in absorbed and only in (None, op.outputs)
            (data,) = graph.data(op)
            state[data] = before(graph, op, state[op.outputs[0]]) if does else state[op.outputs[0]]
        else:
            _carry(graph, op, state)
    return [state[sink.output] for sink in region.sinks]


def _carry(graph: Graph, op: Op, state: dict[int, Affine]) -> None:
    """Carries the map of an operation's outputs to its inputs."""
    shapes = [graph.shape(number) for number in op.inputs]
    if op.name in SLICES:
        _carry_slices(graph, op, state)
    elif op.name == "concatenate":
        axis, start = op.params["dimension"], 0
        for number, shape in zip(op.inputs, shapes, strict=True):
            part = slice(start, start := start + shape[axis])
            state[number] = Affine(*(_part(each, axis, part) for each in state[op.outputs[0]]))
    elif op.name in SUMS:
        multiplier, shift = state[op.outputs[0]]
        state[op.inputs[1]] = Affine(multiplier, np.zeros_like(shift))
        state[op.inputs[0]] = Affine(multiplier, shift)
    else:
        (number,) = graph.data(op)
        affine = state[op.outputs[0]]
        if op.name in MAXIMA:
            check_order(op, affine)
        if op.name in TOTALS:
            affine = Affine(affine.multiplier, affine.shift / count(op, graph.shape(number)))
        state[number] = _unreduced(op, affine, graph.shape(number), graph.shape(op.outputs[0]))


def _unreduced(op: Op, affine: Affine, shape: Any, made: Any) -> Affine:
    if op.name in ("reduce_max", "reduce_sum"):
        return Affine(*(np.expand_dims(each, op.params["axes"]) for each in affine))
    if op.name.startswith("reduce_window"):
        check_window(op, affine)
        return affine
    return Affine(*(laid_back(op, each, shape, made) for each in affine))


def _carry_slices(graph: Graph, op: Op, state: dict[int, Affine]) -> None:
    """Combines the maps of the parts of an input; parts without a batch norm are unchanged."""
    (number,) = op.inputs
    shape = graph.shape(number)
    whole = state.get(number, unchanged(len(shape)))
    for output, part in parts(op, shape).items():
        if output not in state:
            continue
        only = graph.users[number] == [op] and len(op.outputs) == 1
        whole = Affine(
            *(_placed(*each, part, shape, only) for each in zip(whole, state[output], strict=True))
        )
    state[number] = whole


def _placed(
    whole: np.ndarray, part: np.ndarray, where: tuple[slice, ...], shape: Any, only: bool
) -> np.ndarray:
    full = list(np.broadcast_shapes(whole.shape, (1,) * len(shape)))
    for axis, taken in enumerate(where):
        is_partial = (taken.start, taken.stop) != (0, shape[axis])
        if part.shape[axis] != 1 or (is_partial and not only):
            full[axis] = shape[axis]
    placed = np.array(np.broadcast_to(whole, full))
    index = tuple(
        taken if size != 1 else slice(None) for taken, size in zip(where, full, strict=True)
    )
    placed[index] = part
    return placed


def parts(op: Op, shape: Any) -> dict[int, tuple[slice, ...]]:
    """Returns the position of each output of a slice or split in its input."""
    if op.name == "slice":
        starts, stops = op.params["start_indices"], op.params["limit_indices"]
        strides = op.params["strides"] or (1,) * len(starts)
        if any(stride != 1 for stride in strides):
            raise Unfoldable("its input comes from `slice` with steps, not from a linear layer")
        return {op.outputs[0]: tuple(map(slice, starts, stops))}
    found, start = {}, 0
    for output, size in zip(op.outputs, op.params["sizes"], strict=True):
        where = [slice(0, each) for each in shape]
        where[op.params["axis"]] = slice(start, start + size)
        start += size
        found[output] = tuple(where)
    return found


def _part(array: np.ndarray, axis: int, part: slice) -> np.ndarray:
    if array.shape[axis] == 1:
        return array
    return array[(slice(None),) * axis + (part,)]


def check_order(op: Op, affine: Affine) -> None:
    """Raises `Unfoldable` if a map may turn a maximum into a minimum."""
    if (worst := float(affine.multiplier.min(initial=0))) < 0:
        raise Unfoldable(
            f"between a linear layer and it is {name_of(op)}, and its scale is negative "
            f"({worst:.3g}), which turns a maximum into a minimum"
        )


def check_window(op: Op, affine: Affine) -> None:
    """Raises `Unfoldable` if a window spans several features."""
    for axis, size in enumerate(op.params["window_dimensions"]):
        if size != 1 and max(each.shape[axis] for each in affine) != 1:
            raise Unfoldable(f"{name_of(op)} mixes the features with others")


def count(op: Op, shape: Any) -> int:
    """Returns the number of terms of a sum."""
    if op.name == "reduce_sum":
        sizes = [shape[axis] for axis in op.params["axes"]]
    else:
        sizes = op.params["window_dimensions"]
        if any(low or high for low, high in op.params["padding"]):
            raise Unfoldable("its input comes from sums over a padded border")
    if not all(isinstance(size, int) for size in sizes):
        raise Unfoldable(f"its input comes from {name_of(op)} over an axis of symbolic size")
    return math.prod(sizes)


def explained(graph: Graph, region: Region, absorbed: frozenset[Outputs]) -> list[Affine]:
    """Returns the result of `carried_back`; raises `Unfoldable` with the step that prevents it."""
    kernel = "/".join(region.sinks[0].path)
    steps = [op for op in region.ops.values() if graph.is_step(op) and op.outputs not in absorbed]
    for op in steps:
        try:
            graph.step(op)
        except Unfoldable as reason:
            raise Unfoldable(f"between {kernel} and it {reason}") from None
    made = carried_back(graph, region, absorbed)
    if all(map(_fits, region.sinks, made)):
        return made
    for op in steps:
        if not all(map(_fits, region.sinks, carried_back(graph, region, absorbed, op.outputs))):
            what = ", ".join(sorted(map("/".join, graph.sources(op)))) or "a constant"
            raise Unfoldable(
                f"between {kernel} and it is {name_of(op)} of {what}, not one number for each "
                "feature"
            )
    raise Unfoldable(f"between {kernel} and it the features are mixed with others")


def _fits(sink: Linear, affine: Affine) -> bool:
    return all(feature_axes(each, sink.axes) for each in affine)
