"""What is known of each value of a graph from where it comes: examples, devices, and dropout."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax.numpy as jnp

from normjax.diagnostics._lint.axes import NOWHERE, Axes, spread
from normjax.diagnostics._lint.graph import Graph, Kind, Node, collective_axes

SUMMING = ("psum", "all_gather", "pmean", "pmax", "pmin")


def examples(graph: Graph) -> list[Axes]:
    """Returns along which axes the examples lie, which are along axis 0 of x."""
    found: list[Axes] = []
    for node in graph.nodes:
        first = frozenset([0]) if node.op == "input" and node.shape else NOWHERE
        found.append(
            first.union(
                *(
                    _followed(graph, node, operand, found[i])
                    for operand, i in enumerate(node.inputs)
                )
            )
        )
    return found


def _followed(graph: Graph, node: Node, operand: int, axes: Axes) -> Axes:
    shape = graph.nodes[node.inputs[operand]].shape
    if not axes:
        return NOWHERE
    after = spread(node, operand, shape, axes)
    if after is None:
        stays = bool(node.shape) and 0 in axes and node.shape[0] == shape[0]
        return frozenset([0]) if stays else NOWHERE
    return after - (spread(node, operand, shape, NOWHERE) or NOWHERE)


def devices(graph: Graph, names: frozenset[Hashable]) -> list[frozenset[Hashable]]:
    """Returns over which mapped axes values may differ, because x, or what it is made of, is split over them."""
    found: list[frozenset[Hashable]] = []
    for node in graph.nodes:
        own = names if node.op == "input" else frozenset()
        if node.op == "shard" and node.kind >= Kind.MASK:
            own = frozenset(_names(node.params["spec"]))
        summed = collective_axes(node) if node.op.startswith(SUMMING) else ()
        found.append(own.union(*(found[given] for given in node.inputs)) - frozenset(summed))
    return found


def _names(spec: Any) -> list[Hashable]:
    return [
        name
        for part in spec
        if part is not None
        for name in (part if isinstance(part, tuple) else (part,))
    ]


def dropouts(graph: Graph, along: list[Axes]) -> set[int]:
    """Returns the activations that a random mask, one of more than whole examples, sets to 0 in places."""
    # along which axes there are numbers of their own; None for what is not random
    drawn: list[Axes | None] = []
    masks: set[int] = set()
    found = set()
    for number, node in enumerate(graph.nodes):
        drawn.append(_drawn(graph, node, drawn))
        if node.kind != Kind.MASK:
            data = graph.data(number)
            chance = [
                given
                for given in node.inputs
                if given in masks and (drawn[given] or NOWHERE) - along[number]
            ]
            zeroed = node.op in ("mul", "div") or (node.op == "select_n" and len(node.inputs) == 3)
            if chance and zeroed and len(data) == 1:
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
    axes = NOWHERE
    chance = [
        (operand, given) for operand, given in enumerate(node.inputs) if drawn[given] is not None
    ]
    for operand, given in chance:
        axes |= spread(node, operand, graph.nodes[given].shape, drawn[given] or NOWHERE) or NOWHERE
    return axes if chance else None


def varying(graph: Graph) -> list[Axes]:
    """Returns along which axes values may vary that do not depend on activations."""
    found: list[Axes] = []
    for node in graph.nodes:
        shape = getattr(node.aval, "shape", ())
        everywhere = frozenset(axis for axis, size in enumerate(shape) if size > 1)
        parts = [
            spread(node, i, graph.nodes[given].shape, found[given])
            for i, given in enumerate(node.inputs)
        ]
        known = parts and node.kind != Kind.DATA and None not in parts
        found.append(
            everywhere & frozenset().union(*(part or NOWHERE for part in parts))
            if known
            else everywhere
        )
    return found
