"""Folds batch norms into the linear layers after them.

The affine map of a batch norm is carried forward to all of its readers: through layouts, maxima if
the map does not change the order, means, concatenation and slices, up to linear layers. Their
kernels absorb the scale, and their biases the product of the kernel with the shift. Padded zeros
become the value that the map sends to zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from normjax._jaxpr import Op
from normjax.deploy._backward import (
    MAXIMA,
    SLICES,
    THROUGH,
    TOTALS,
    Outputs,
    check_order,
    check_window,
    count,
    parts,
)
from normjax.deploy._graph import LINEAR, Graph, Linear, after, name_of
from normjax.deploy._layout import Affine, Unfoldable, feature_axes, laid_out, unchanged

FARTHEST = 1e30


class Spread(NamedTuple):
    """The operations from the input of a batch norm to the linear layers that read it.

    Attributes:
      head: the input of the batch norm.
      ops: the operations by their outputs, in program order.
      sinks: the linear layers.
    """

    head: int
    ops: dict[Outputs, Op]
    sinks: list[Linear]


class Carried(NamedTuple):
    """The affine maps to apply elsewhere once a batch norm is removed.

    Attributes:
      inner: the map of the input of each linear layer.
      pads: the map of the input of each `pad`, by its outputs.
    """

    inner: list[Affine]
    pads: dict[Outputs, Affine]


def push(graph: Graph, chain: list[Op]) -> Spread:
    """Returns the operations from a batch norm to linear layers; raises `Unfoldable` for others."""
    (head,) = graph.data(chain[0])
    ops = {op.outputs: op for op in chain}
    sinks: dict[Outputs, Linear] = {}
    todo = list(chain[-1].outputs)
    while todo:
        number = todo.pop()
        for op in graph.users[number]:
            if op is None:
                raise Unfoldable("its output is returned")
            if op.name in LINEAR:
                sinks[op.outputs] = _linear(graph, op)
            elif op.outputs not in ops:
                ops[op.outputs] = _taken(graph, op)
                todo += op.outputs
    if not sinks:
        raise Unfoldable("no linear layer reads it")
    order = {op.outputs: op for op in graph.program.ops if op.outputs in ops}
    return Spread(head, order, list(sinks.values()))


def _linear(graph: Graph, op: Op) -> Linear:
    try:
        return graph.linear(op)
    except Unfoldable as reason:
        said = str(reason).replace("linear layer before it", "linear layer after it")
        said = said.replace("its input comes from", "it is followed by")
        raise Unfoldable(said.removesuffix(", not from a linear layer")) from None


def _taken(graph: Graph, op: Op) -> Op:
    one = len(graph.data(op)) == 1
    known = graph.passes(op) or graph.is_step(op) or (one and op.name in (*THROUGH, "pad"))
    if known or op.name == "concatenate":
        return op
    raise Unfoldable(f"it is followed by {name_of(op)}")


def carried_forward(graph: Graph, spread: Spread, absorbed: frozenset[Outputs]) -> Carried:
    """Returns the maps that linear layers and `pad`s have to apply."""
    state = {spread.head: unchanged(len(graph.shape(spread.head)))}
    pads: dict[Outputs, Affine] = {}
    for op in spread.ops.values():
        if op.name == "pad":
            pads[op.outputs] = _check_pad(graph, op, state[op.inputs[0]])
        if not graph.is_step(op):
            _carry(graph, op, state)
            continue
        (data,) = graph.data(op)
        does = op.outputs not in absorbed
        state[op.outputs[0]] = after(graph, op, state[data]) if does else state[data]
    inner = [state[sink.data] for sink in spread.sinks]
    for sink, affine in zip(spread.sinks, inner, strict=True):
        _check_linear(sink, affine)
    return Carried(inner, pads)


def _carry(graph: Graph, op: Op, state: dict[int, Affine]) -> None:
    """Carries the map of an operation's inputs to its outputs."""
    if op.name == "concatenate":
        state[op.outputs[0]] = _concatenated(graph, op, state)
        return
    (number,) = graph.data(op)
    affine, shape = state[number], graph.shape(number)
    if op.name in SLICES:
        for output, where in parts(op, shape).items():
            state[output] = Affine(*(_part(each, where) for each in affine))
        return
    if op.name in MAXIMA:
        check_order(op, affine)
    if op.name in TOTALS:
        affine = Affine(affine.multiplier, affine.shift * count(op, shape))
    if op.name.startswith("reduce_window"):
        check_window(op, affine)
    elif op.name in ("reduce_max", "reduce_sum"):
        affine = _reduced(op, affine)
    elif op.name != "pad":
        made = graph.shape(op.outputs[0])
        affine = Affine(*(laid_out(op, each, shape, made) for each in affine))
    state[op.outputs[0]] = affine


def _reduced(op: Op, affine: Affine) -> Affine:
    axes = op.params["axes"]
    if any(each.shape[axis] != 1 for each in affine for axis in axes):
        raise Unfoldable(f"it is followed by {name_of(op)} over its features")
    return Affine(*(each.squeeze(axes) for each in affine))


def _part(array: np.ndarray, where: tuple[slice, ...]) -> np.ndarray:
    sizes = zip(where, array.shape, strict=True)
    return array[tuple(part if size != 1 else slice(None) for part, size in sizes)]


def _concatenated(graph: Graph, op: Op, state: dict[int, Affine]) -> Affine:
    axis, rank = op.params["dimension"], len(graph.shape(op.outputs[0]))
    own = [state.get(number, unchanged(rank)) for number in op.inputs]
    sizes = [graph.shape(number)[axis] for number in op.inputs]
    if not all(isinstance(size, int) for size in sizes):
        raise Unfoldable("it is followed by `concatenate` along an axis of symbolic size")
    others = [list(part.shape) for each in own for part in each]
    for each in others:
        each[axis] = 1
    shape = np.broadcast_shapes(*map(tuple, others))
    whole = []
    for column in zip(*own, strict=True):
        if all(np.array_equal(each, column[0]) and each.shape[axis] == 1 for each in column):
            whole.append(column[0])  # such as the parts of a circular border
            continue
        wide = [np.ones((1,) * rank) * each for each in column]
        full = [
            np.broadcast_to(each, [*shape[:axis], size, *shape[axis + 1 :]])
            for each, size in zip(wide, sizes, strict=True)
        ]
        whole.append(np.concatenate(full, axis))
    return Affine(*whole)


def _check_pad(graph: Graph, op: Op, affine: Affine) -> Affine:
    for axis, (low, high, inner) in enumerate(op.params["padding_config"]):
        if (low, high, inner) != (0, 0, 0) and max(each.shape[axis] for each in affine) != 1:
            raise Unfoldable("it is followed by `pad` along its features")
    preimage(affine, graph.padding(op))
    return affine


def _check_linear(sink: Linear, affine: Affine) -> None:
    params = sink.op.params
    if sink.op.name == "dot_general":
        contracted, batch = params["dimension_numbers"]
        read = (*contracted[1 - sink.side], *batch[1 - sink.side])
    else:
        read = (params["dimension_numbers"].lhs_spec[1],)
    if not all(feature_axes(each, read) for each in affine):
        raise Unfoldable(f"{'/'.join(sink.path)} does not read its features one by one")
    if pads_zeros(sink.op):
        preimage(affine, 0.0)


def pads_zeros(op: Op) -> bool:
    """Returns whether a linear operation pads its input with zeros, around or between elements."""
    if op.name != "conv_general_dilated":
        return False
    dilated = any(each != 1 for each in op.params["lhs_dilation"])
    return dilated or any(low or high for low, high in op.params["padding"])


def preimage(affine: Affine, value: float) -> np.ndarray:
    """Returns the value that a map sends to the given value, as a compact array."""
    multiplier, shift = np.broadcast_arrays(*affine)
    if value == -np.inf and (multiplier > 0).all():
        return np.full(multiplier.shape, -np.inf)
    wanted = value - shift
    # Values beyond `FARTHEST`, as with a scale of 1e-40, may not fit into the kernel's dtype.
    lost = (np.abs(multiplier) * FARTHEST < np.abs(wanted)) & (wanted != 0)
    if lost.any() or not np.isfinite(value):
        where = int(lost.ravel().argmax())
        raise Unfoldable(
            f"it is followed by a border of {value:g}, and its scale at feature {where} is "
            f"{multiplier.ravel()[where]:g}: nothing is sent to {value:g} there"
        )
    return np.divide(wanted, multiplier, out=np.zeros(wanted.shape), where=multiplier != 0)
