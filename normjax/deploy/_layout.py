"""Transforms per-feature values through operations that only change the layout of a value.

A compact array has the rank of its value, and size 1 along every axis on which it does not depend.
So it does not need the sizes of the batch or of an image, which may be symbolic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp

from normjax._jaxpr import Op

LAYOUT = (
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "rev",
    "broadcast_in_dim",
)
PASSING = ("convert_element_type", "copy", "stop_gradient", "name")
Shape = tuple[Any, ...]


class Unfoldable(Exception):
    """Raised if a batch norm cannot be folded; the message is the reason."""


class Affine(NamedTuple):
    """The multiplier of a value and the shift that is then added, as compact arrays."""

    multiplier: np.ndarray
    shift: np.ndarray


def unchanged(rank: int) -> Affine:
    """Returns the identity map."""
    return Affine(np.ones((1,) * rank), np.zeros((1,) * rank))


def laid_out(op: Op, array: Any, before: Shape, after: Shape) -> Any:
    """Converts a compact array of an operation's input to one of its output."""
    if op.name in PASSING:
        return array
    if op.name == "transpose":
        return array.transpose(op.params["permutation"])
    if op.name == "rev":
        return _flipped(array, op.params["dimensions"])
    if op.name == "broadcast_in_dim":
        axes = op.params["broadcast_dimensions"]
        sizes = [array.shape[axes.index(i)] if i in axes else 1 for i in range(len(after))]
        return array.reshape(sizes)
    order = op.params.get("dimensions") if op.name == "reshape" else None
    if order is not None:  # a transposition that `vmap` of a convolution includes in a reshape
        array, before = array.transpose(order), tuple(before[axis] for axis in order)
    return _reshaped(array, before, after, op)


def laid_back(op: Op, array: Any, before: Shape, after: Shape) -> Any:
    """Converts a compact array of an operation's output to one of its input."""
    if op.name in PASSING:
        return array
    if op.name == "transpose":
        return array.transpose(np.argsort(op.params["permutation"]))
    if op.name == "rev":
        return _flipped(array, op.params["dimensions"])
    if op.name == "broadcast_in_dim":
        axes = op.params["broadcast_dimensions"]
        kept = [i for i in axes if before[axes.index(i)] == after[i]]
        if any(array.shape[i] != 1 for i in range(array.ndim) if i not in kept):
            raise Unfoldable("`broadcast_in_dim` repeats features that the batch norm tells apart")
        return array.reshape([array.shape[axis] for axis in axes])
    order = op.params.get("dimensions") if op.name == "reshape" else None
    if order is None:
        return _reshaped(array, after, before, op)
    moved_shape = tuple(before[axis] for axis in order)
    return _reshaped(array, after, moved_shape, op).transpose(np.argsort(order))


def feature_axes(array: Any, allowed: tuple[int, ...]) -> bool:
    """Returns whether a compact array only depends on the given axes."""
    return all(size == 1 or axis in allowed for axis, size in enumerate(array.shape))


def moved(array: Any, taken: tuple[int, ...], placed: tuple[int, ...], rank: int) -> Any:
    """Moves the axes `taken` of an array to the positions `placed`, with size 1 elsewhere."""
    order = np.argsort(placed)
    ordered = array.transpose([*(taken[i] for i in order), *_others(taken, array.ndim)])
    sizes = [1] * rank
    for i in order:
        sizes[placed[i]] = array.shape[taken[i]]
    return ordered.reshape(sizes)


def _others(axes: tuple[int, ...], rank: int) -> list[int]:
    return [axis for axis in range(rank) if axis not in axes]


def _flipped(array: Any, axes: Any) -> Any:
    return array[tuple(slice(None, None, -1 if i in axes else 1) for i in range(array.ndim))]


def _reshaped(array: Any, before: Shape, after: Shape, op: Op) -> Any:
    """Reshapes a compact array in the same way as an array of shape `before` to `after`."""
    full: list[Any] = []
    sizes: list[Any] = []
    for (start, stop), (first, last) in _groups(before, after):
        own, made = array.shape[start:stop], after[first:last]
        if all(size == 1 for size in own):
            full += own
            sizes += [1] * len(made)
        else:
            full += before[start:stop]
            sizes += made
    if not all(isinstance(size, int | np.integer) for size in (*full, *sizes)):
        raise Unfoldable(f"`{op.name}` mixes the features with an axis whose size is symbolic")
    broadcast = np.broadcast_to if isinstance(array, np.ndarray) else jnp.broadcast_to
    return broadcast(array, full).reshape(sizes)


def _groups(before: Shape, after: Shape) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns the smallest runs of axes that are reshaped separately."""
    ends, other_ends = _products(before), _products(after)
    groups, start, first = [], 0, 0
    for stop in range(1, len(before) + 1):
        matches = [j for j in range(first + 1, len(after) + 1) if ends[stop] == other_ends[j]]
        if matches:
            groups.append(((start, stop), (first, matches[0])))
            start, first = stop, matches[0]
    if start < len(before) or first < len(after):
        groups.append(((start, len(before)), (first, len(after))))
    return groups


def _products(sizes: Shape) -> list[Any]:
    products: list[Any] = [1]
    for size in sizes:
        products.append(products[-1] * size)
    return products
