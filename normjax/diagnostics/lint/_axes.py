"""Finds the axes along which a value varies, from the axes along which its operands do."""

from __future__ import annotations

import math
from collections.abc import Collection

from jax.lax import GatherScatterMode

from normjax.diagnostics.lint._graph import Node

Axes = frozenset[int]
NOWHERE: Axes = frozenset()

# Operations that multiply activations by a kernel.
LAYERS = ("dot_general", "conv_general_dilated")
REDUCING = {
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "argmax",
    "argmin",
    "reduce_and",
    "reduce_or",
}
POOLING = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}


def spread(node: Node, operand: int, shape: tuple[int, ...], axes: Collection[int]) -> Axes | None:
    """Returns the axes along which an operation's result varies; None if they are unknown.

    Args:
      node: the operation, as the node of its result.
      operand: which of its inputs varies, counted from 0; the others are constant.
      shape: the shape of that input.
      axes: the axes along which that input varies.
    """
    params, op = node.params, node.op
    if not shape:
        return NOWHERE
    if op == "broadcast_in_dim":
        return frozenset(params["broadcast_dimensions"][axis] for axis in axes)
    if op == "transpose":
        return frozenset(params["permutation"].index(axis) for axis in axes)
    if op in REDUCING:
        others = [axis for axis in range(len(shape)) if axis not in params["axes"]]
        return frozenset(others.index(axis) for axis in axes if axis in others)
    if op in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(shape, node.shape, axes)
    if op == "dot_general":
        return _multiplied(node, operand, shape, axes)
    if op == "conv_general_dilated":
        return _convolved(node, operand, axes)
    if op == "gather":
        return _gathered(node, operand, axes)
    if op == "take":
        return frozenset(axis - 1 for axis in axes if axis > 0)
    if op == "stack":
        return frozenset(axis + 1 for axis in axes)
    if op in POOLING or op in ("concatenate", "pad"):
        return frozenset(axes) | _joined(node)
    return frozenset(axes) if len(shape) == len(node.shape) else None


def _joined(node: Node) -> Axes:
    """Returns the axes along which an operation joins its operand to zeros or other values."""
    params = node.params
    if node.op == "concatenate":
        return frozenset([params["dimension"]])
    if node.op == "pad":
        return frozenset(axis for axis, sides in enumerate(params["padding_config"]) if any(sides))
    if node.op == "reduce_window_sum":
        return frozenset(axis for axis, sides in enumerate(params["padding"]) if any(sides))
    return NOWHERE  # the padding of a maximum or a minimum is never the result


def reduced(node: Node, operand: int) -> Axes:
    """Returns the axes of an operand that an operation sums over, or reduces otherwise."""
    if node.op in REDUCING:
        return frozenset(node.params["axes"])
    if node.op == "dot_general":
        return frozenset(node.params["dimension_numbers"][0][operand])
    return NOWHERE


def _gathered(node: Node, operand: int, axes: Collection[int]) -> Axes | None:
    """Returns the axes of values read at indices, as a resize to the nearest reads them.

    Along the axes where the operand is constant, every index reads the same. None means that it is
    unknown, as if indices out of bounds read a fill value.
    """
    params = node.params
    numbers = params["dimension_numbers"]
    clipped = (GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)
    if operand != 0 or params["mode"] not in clipped or numbers.operand_batching_dims:
        return None
    whole = [i for i in range(len(params["slice_sizes"])) if i not in numbers.collapsed_slice_dims]
    after = {numbers.offset_dims[whole.index(axis)] for axis in axes if axis in whole}
    if set(axes) & set(numbers.start_index_map):
        after |= set(range(len(node.shape))) - set(numbers.offset_dims)
    return frozenset(after)


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], axes: Collection[int]) -> Axes:
    """Returns the axes after a reshape; of axes that are split or merged, all parts vary."""
    if 0 in before:
        return frozenset(range(len(after)))
    found, i, j = set(), 0, 0
    while i < len(before) and j < len(after):
        old, new = [i], [j]
        while True:
            a, b = math.prod(before[k] for k in old), math.prod(after[k] for k in new)
            if a == b:
                break
            if a < b:
                old.append(old[-1] + 1)
            else:
                new.append(new[-1] + 1)
        if any(axis in axes and (before[axis] != 1 or len(old) == 1) for axis in old):
            found |= {axis for axis in new if after[axis] != 1 or len(new) == 1}
        i, j = old[-1] + 1, new[-1] + 1
    return frozenset(found)


def _multiplied(node: Node, operand: int, shape: tuple[int, ...], axes: Collection[int]) -> Axes:
    """Returns the axes of a matrix product; the other operand may vary along its free axes."""
    contracted, batch = node.params["dimension_numbers"]
    taken = (*contracted[operand], *batch[operand])
    free = [axis for axis in range(len(shape)) if axis not in taken]
    others = len(node.shape) - len(batch[0]) - len(free)
    first = len(batch[0]) + (others if operand == 1 else 0)
    result = {first + free.index(axis) for axis in axes if axis in free}
    result |= {batch[operand].index(axis) for axis in axes if axis in batch[operand]}
    start = len(batch[0]) + (len(free) if operand == 0 else 0)
    return frozenset(result | set(range(start, start + others)))


def _convolved(node: Node, operand: int, axes: Collection[int]) -> Axes | None:
    if operand != 0:
        return None
    params, numbers = node.params, node.params["dimension_numbers"]
    placed = [numbers.lhs_spec.index(axis) for axis in axes]
    moved = {numbers.out_spec[place] for place in placed if place != 1}
    window = zip(numbers.out_spec[2:], params["padding"], params["lhs_dilation"], strict=True)
    for axis, sides, dilation in window:
        if any(sides) or dilation > 1:  # padded zeros make the borders differ
            moved.add(axis)
    return frozenset(moved | {numbers.out_spec[1]})
