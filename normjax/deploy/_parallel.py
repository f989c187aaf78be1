"""Merges sums of linear layers and batch norms of the same value into one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from normjax._jaxpr import Op
from normjax._trees import Path
from normjax.deploy._backward import Outputs
from normjax.deploy._graph import LINEAR, Graph, Linear, after
from normjax.deploy._layout import PASSING, Affine, Unfoldable, feature_axes, unchanged


class Term(NamedTuple):
    """An operand of a sum.

    Attributes:
      output: the operand.
      ops: the scales and shifts that compute it.
      linear: the linear layer before them; None if they follow `source` itself.
      source: the input of the branch.
    """

    output: int
    ops: list[Op]
    linear: Linear | None
    source: int


class Merge(NamedTuple):
    """Branches that become one kernel.

    Attributes:
      target: the layer that stays.
      terms: all branches, including the target.
      offsets: the spatial position of the kernel of each branch in the target's kernel.
      scales: the map of each branch without a linear layer; None for other branches.
    """

    target: Linear
    terms: list[Term]
    offsets: list[tuple[int, ...]]
    scales: list[Affine | None]


def same_input_terms(
    graph: Graph, absorbed: frozenset[Outputs], inner: Mapping[Path, Affine]
) -> list[list[Term]]:
    """Returns the operands of sums that read the same value."""
    found = []
    inside = set()
    for op in reversed(graph.program.ops):
        if not _is_sum(graph, op) or op.outputs in inside:
            continue
        by_source: dict[int, list[Term]] = {}
        for number in _operands(graph, op, inside):
            term = _term(graph, number, absorbed)
            known = term is not None and (term.linear is None or term.linear.path not in inner)
            if term is not None and known:
                by_source.setdefault(term.source, []).append(term)
        found += [terms for terms in by_source.values() if len(terms) > 1]
    return found


def _is_sum(graph: Graph, op: Op | None) -> bool:
    return op is not None and op.name == "add" and len(graph.data(op)) == 2


def _operands(graph: Graph, op: Op, inside: set[Outputs]) -> list[int]:
    """Returns the operands of a nested sum."""
    inside.add(op.outputs)
    found = []
    for number in op.inputs:
        maker = graph.makers.get(number)
        if graph.users[number] != [op]:
            continue
        if maker is not None and _is_sum(graph, maker):
            found += _operands(graph, maker, inside)
        else:
            found.append(number)
    return found


def _term(graph: Graph, output: int, absorbed: frozenset[Outputs]) -> Term | None:
    """Returns a branch, or None if it has other operations than scales and shifts."""
    ops: list[Op] = []
    number = output
    while (op := graph.makers.get(number)) is not None:
        if op.name in LINEAR:
            return _linear_term(graph, output, ops, op, absorbed)
        if not (graph.is_step(op) or op.name in PASSING):
            break
        (given,) = graph.data(op)
        ops.insert(0, op)
        number = given
        if graph.users[number] != [op] and graph.makers.get(number) is not None:
            break
    has_norm = any(graph.is_step(op) and graph.norms_of(op) for op in ops)
    free = not any(op.outputs in absorbed for op in ops)
    return Term(output, ops, None, number) if has_norm and free else None


def _linear_term(
    graph: Graph, output: int, ops: list[Op], op: Op, absorbed: frozenset[Outputs]
) -> Term | None:
    try:
        linear = graph.linear(op)
    except Unfoldable:
        return None
    left = [each for each in ops if graph.is_step(each) and each.outputs not in absorbed]
    return None if left else Term(output, ops, linear, linear.data)


def merges(
    graph: Graph,
    terms: list[Term],
    outer: Mapping[Path, Affine],
    absorbed: frozenset[Outputs],
) -> list[Merge]:
    """Returns the branches that fit into the largest of their kernels, if there are several."""
    linear = [term for term in terms if term.linear is not None]
    if not linear:
        return []
    target = max(linear, key=lambda term: _size(graph, term)).linear
    if target is None:
        return []
    kept: list[Term] = []
    offsets: list[tuple[int, ...]] = []
    scales: list[Affine | None] = []
    for term in terms:
        try:
            offset, scale = _fitted(graph, target, term)
        except Unfoldable:
            continue
        kept.append(term)
        offsets.append(offset)
        scales.append(scale)
    return [Merge(target, kept, offsets, scales)] if len(kept) > 1 else []


def _size(graph: Graph, term: Term) -> int:
    return 0 if term.linear is None else int(np.prod(graph.shape(term.linear.operand)))


def _fitted(graph: Graph, target: Linear, term: Term) -> tuple[tuple[int, ...], Affine | None]:
    """Returns the position of a branch in the target's kernel, or raises `Unfoldable`."""
    if term.linear is not None:
        return _offset(graph, target, term.linear), None
    affine = unchanged(len(graph.shape(term.source)))
    for op in term.ops:
        affine = after(graph, op, affine) if graph.is_step(op) else affine
    if any(not graph.is_folded(op) for op in term.ops if graph.is_step(op)):
        raise Unfoldable("a factor that is made of sizes")
    if not all(feature_axes(each, target.axes) for each in affine):
        raise Unfoldable("not one number for each feature")
    return _identity_offset(graph, target), affine


def _offset(graph: Graph, target: Linear, other: Linear) -> tuple[int, ...]:
    mine, own = target.op.params, other.op.params
    if target.op.name != other.op.name or target.side != other.side:
        raise Unfoldable("another kind of layer")
    same = ["dimension_numbers"]
    if target.op.name == "dot_general":
        if graph.shape(target.operand) != graph.shape(other.operand):
            raise Unfoldable("another shape")
    else:
        same += ["window_strides", "feature_group_count", "batch_group_count", "lhs_dilation"]
    if any(mine[name] != own[name] for name in same):
        raise Unfoldable("another layout")
    return () if target.op.name == "dot_general" else _window_offset(graph, target, other)


def _window_offset(graph: Graph, target: Linear, other: Linear) -> tuple[int, ...]:
    mine, own = target.op.params, other.op.params
    spatial = mine["dimension_numbers"].rhs_spec[2:]
    offsets = []
    for i, axis in enumerate(spatial):
        size, small = (graph.shape(each.operand)[axis] for each in (target, other))
        dilation = mine["rhs_dilation"][i]
        if small != 1 and own["rhs_dilation"][i] != dilation:
            raise Unfoldable("another dilation")
        offsets.append(
            _position(mine["padding"][i][0] - own["padding"][i][0], dilation, size, small)
        )
    if any(each != 1 for each in mine["lhs_dilation"]):
        raise Unfoldable("a transposed convolution")
    return tuple(offsets)


def _position(distance: int, dilation: int, size: int, small: int) -> int:
    place, rest = divmod(distance, dilation)
    if rest or place < 0 or place + small > size:
        raise Unfoldable("a window that is not inside of the largest")
    return place


def _identity_offset(graph: Graph, target: Linear) -> tuple[int, ...]:
    """Returns the position in the largest kernel of the element of a branch without a layer."""
    params, shape = target.op.params, graph.shape(target.operand)
    if graph.shape(target.data) != graph.shape(target.output):
        raise Unfoldable("another shape")
    if target.op.name == "dot_general":
        contracted, batch = params["dimension_numbers"]
        last = len(graph.shape(target.data)) - 1
        plain = target.side == 1 and contracted[0] == (last,) and not batch[0] and len(shape) == 2
        if not plain:
            raise Unfoldable("another layout")
        return ()
    numbers = params["dimension_numbers"]
    strides = (*params["window_strides"], *params["lhs_dilation"])
    if numbers.lhs_spec != numbers.out_spec or any(each != 1 for each in strides):
        raise Unfoldable("another layout")
    return tuple(
        _position(low, dilation, shape[axis], 1)
        for axis, (low, _), dilation in zip(
            numbers.rhs_spec[2:], params["padding"], params["rhs_dilation"], strict=True
        )
    )


def merged_kernel(graph: Graph, merge: Merge, kernels: Mapping[Path, np.ndarray]) -> np.ndarray:
    """Returns the kernel, as the operation reads it, that is equivalent to all branches."""
    whole = kernels[merge.target.path].copy()
    for term, offset, scale in zip(merge.terms, merge.offsets, merge.scales, strict=True):
        if term.linear is None and scale is not None:
            _add_identity(merge.target, whole, offset, scale.multiplier)
        elif term.linear is not None and term.linear.path != merge.target.path:
            whole[_window(merge.target, offset, kernels[term.linear.path])] += kernels[
                term.linear.path
            ]
    return whole


def _window(target: Linear, offset: tuple[int, ...], kernel: np.ndarray) -> tuple[slice, ...]:
    index = [slice(None)] * kernel.ndim
    if offset:
        for axis, start in zip(
            target.op.params["dimension_numbers"].rhs_spec[2:], offset, strict=True
        ):
            index[axis] = slice(start, start + kernel.shape[axis])
    return tuple(index)


def _add_identity(
    target: Linear, whole: np.ndarray, offset: tuple[int, ...], scale: np.ndarray
) -> None:
    if target.op.name == "dot_general":
        (given,) = target.op.params["dimension_numbers"][0][1]
        made, index = 1 - given, [slice(None), slice(None)]
        groups = 1
    else:
        made, given, *spatial = target.op.params["dimension_numbers"].rhs_spec
        groups, index = target.op.params["feature_group_count"], [slice(None)] * whole.ndim
        for axis, place in zip(spatial, offset, strict=True):
            index[axis] = slice(place, place + 1)
    count = whole.shape[made]
    outputs = np.arange(count)
    plane = np.moveaxis(whole[tuple(index)], (given, made), (0, 1)).reshape(-1, count)
    added = np.zeros_like(plane)
    added[outputs % (count // groups), outputs] = np.broadcast_to(scale.ravel(), count)
    shape = np.moveaxis(whole[tuple(index)], (given, made), (0, 1)).shape
    whole[tuple(index)] += np.moveaxis(added.reshape(shape), (0, 1), (given, made))
