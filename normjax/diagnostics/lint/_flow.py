"""Follows examples, mapped axes and dropout through the values of a graph."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax.numpy as jnp

from normjax.diagnostics.lint._axes import NOWHERE, Axes, spread
from normjax.diagnostics.lint._graph import Graph, Kind, Node, collective_axes

SUMMING = ("psum", "all_gather", "pmean", "pmax", "pmin")


def examples(graph: Graph) -> list[Axes]:
    """Returns for each value the axes along which the examples lie: axis 0 of x, at first."""
    found: list[Axes] = []
    for node in graph.nodes:
        axes = frozenset([0]) if node.op == "input" and node.shape else NOWHERE
        for operand, given in enumerate(node.inputs):
            axes |= followed(graph, node, operand, found[given])
        found.append(axes)
    return found


def followed(graph: Graph, node: Node, operand: int, axes: Axes) -> Axes:
    """Returns where axes of an operand are in a result.

    If the operation is unknown, axis 0 is taken to stay axis 0 as long as it keeps its size.
    """
    shape = graph.nodes[node.inputs[operand]].shape
    if not axes:
        return NOWHERE
    after = spread(node, operand, shape, axes)
    if after is None:
        stays = bool(node.shape) and 0 in axes and node.shape[0] == shape[0]
        return frozenset([0]) if stays else NOWHERE
    return after - (spread(node, operand, shape, NOWHERE) or NOWHERE)


def devices(graph: Graph, names: frozenset[Hashable]) -> list[frozenset[Hashable]]:
    """Returns for each value the mapped axes over which it may differ from device to device."""
    found: list[frozenset[Hashable]] = []
    for node in graph.nodes:
        own = names if node.op == "input" else frozenset()
        if node.op == "shard" and node.kind >= Kind.MASK:
            own = frozenset(_names(node.params["spec"]))
        summed = collective_axes(node) if node.op.startswith(SUMMING) else ()
        found.append(own.union(*(found[given] for given in node.inputs)) - frozenset(summed))
    return found


def _names(spec: Any) -> list[Hashable]:
    names = []
    for part in spec:
        if part is not None:
            names += part if isinstance(part, tuple) else (part,)
    return names


def dropouts(graph: Graph, along: list[Axes]) -> set[int]:
    """Returns the activations that a random mask sets to 0 element by element."""
    # The axes along which random numbers differ; None for a value that is not random.
    drawn: list[Axes | None] = []
    masks: set[int] = set()
    found = set()
    for number, node in enumerate(graph.nodes):
        drawn.append(_drawn(graph, node, drawn))
        if node.kind != Kind.MASK:
            masking = [given for given in node.inputs if given in masks]
            inside = [given for given in masking if (drawn[given] or NOWHERE) - along[number]]
            selects = node.op == "select_n" and len(node.inputs) == 3
            zeroes = node.op in ("mul", "div") or selects
            if inside and zeroes and len(graph.data(number)) == 1:
                found.add(number)
        elif drawn[number] is not None:
            if jnp.issubdtype(node.aval.dtype, jnp.bool_) or masks & set(node.inputs):
                masks.add(number)
    return found


def _drawn(graph: Graph, node: Node, drawn: list[Axes | None]) -> Axes | None:
    if node.op in ("random_bits", "rng_bit_generator", "rng_uniform"):
        return frozenset(axis for axis, size in enumerate(node.shape) if size > 1)
    if node.kind != Kind.MASK:
        return None
    axes: Axes | None = None
    for operand, given in enumerate(node.inputs):
        own = drawn[given]
        if own is not None:
            after = spread(node, operand, graph.nodes[given].shape, own)
            axes = (axes or NOWHERE) | (after or NOWHERE)
    return axes


def varying(graph: Graph) -> list[Axes]:
    """Returns for each value the axes along which it may vary.

    It is followed through operations only if it does not depend on activations.
    """
    found: list[Axes] = []
    for node in graph.nodes:
        shape = getattr(node.aval, "shape", ())
        everywhere = frozenset(axis for axis, size in enumerate(shape) if size > 1)
        parts = [
            spread(node, i, graph.nodes[given].shape, found[given])
            for i, given in enumerate(node.inputs)
        ]
        known = [part for part in parts if part is not None]
        if node.kind == Kind.DATA or not known or len(known) < len(parts):
            found.append(everywhere)
        else:
            found.append(everywhere & NOWHERE.union(*known))
    return found
