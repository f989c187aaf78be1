"""Along which axes a value varies, given along which its operands do."""

from __future__ import annotations

import math
from collections.abc import Collection

from normjax.diagnostics._lint.graph import Node

Axes = frozenset[int]
NOWHERE: Axes = frozenset()

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
    """Returns the axes along which an operation's result varies; None where nothing is known about it.

    Args:
      node: the result.
      operand: which of its inputs.
      shape: of that input.
      axes: along which that input varies; the others are taken not to.
    """
    params, op = node.params, node.op
    if not shape:
        return NOWHERE
    if op == "broadcast_in_dim":
        return frozenset(params["broadcast_dimensions"][axis] for axis in axes)
    if op == "transpose":
        return frozenset(params["permutation"].index(axis) for axis in axes)
    if op in REDUCING:
        kept = [axis for axis in range(len(shape)) if axis not in params["axes"]]
        return frozenset(kept.index(axis) for axis in axes if axis in kept)
    if op in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(shape, node.shape, axes)
    if op == "dot_general":
        return _multiplied(node, operand, shape, axes)
    if op == "conv_general_dilated":
        return _convolved(node, operand, axes)
    if op in POOLING:
        padded = {
            axis
            for axis, sides in enumerate(params["padding"])
            if op == "reduce_window_sum" and any(sides)
        }
        return frozenset(axes) | padded
    if op == "concatenate":
        return frozenset(axes) | {params["dimension"]}
    if op == "pad":
        return frozenset(axes) | {
            axis for axis, sides in enumerate(params["padding_config"]) if any(sides)
        }
    if op == "take":
        return frozenset(axis - 1 for axis in axes if axis > 0)
    if op == "stack":
        return frozenset(axis + 1 for axis in axes)
    return frozenset(axes) if len(shape) == len(node.shape) else None


def reduced(node: Node, operand: int) -> Axes:
    """Returns the axes of an operand that an operation adds up, or otherwise makes one of."""
    if node.op in REDUCING:
        return frozenset(node.params["axes"])
    if node.op == "dot_general":
        return frozenset(node.params["dimension_numbers"][0][operand])
    return NOWHERE


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], axes: Collection[int]) -> Axes:
    """Axes that are cut or merged vary in all of their parts."""
    if 0 in before:
        return frozenset(range(len(after)))
    found, i, j = set(), 0, 0
    while i < len(before) and j < len(after):
        old, new = [i], [j]
        while (a := math.prod(before[k] for k in old)) != (b := math.prod(after[k] for k in new)):
            if a < b:
                old.append(old[-1] + 1)
            else:
                new.append(new[-1] + 1)
        if any(axis in axes and (before[axis] != 1 or len(old) == 1) for axis in old):
            found |= {axis for axis in new if after[axis] != 1 or len(new) == 1}
        i, j = old[-1] + 1, new[-1] + 1
    return frozenset(found)


def _multiplied(node: Node, operand: int, shape: tuple[int, ...], axes: Collection[int]) -> Axes:
    """Along its free axes the other operand varies, in all likelihood."""
    contracted, batch = node.params["dimension_numbers"]
    free = [
        axis for axis in range(len(shape)) if axis not in (*contracted[operand], *batch[operand])
    ]
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
    moved = {
        numbers.out_spec[numbers.lhs_spec.index(axis)]
        for axis in axes
        if axis != numbers.lhs_spec[1]
    }
    for axis, sides, dilation in zip(
        numbers.out_spec[2:], params["padding"], params["lhs_dilation"], strict=True
    ):
        if any(sides) or dilation > 1:
            moved.add(axis)
    return frozenset(moved | {numbers.out_spec[1]})
