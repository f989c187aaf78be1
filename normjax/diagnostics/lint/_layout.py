"""Finds layers that take positions for features, as for images with their channels first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from normjax.diagnostics.findings import Finding
from normjax.diagnostics.lint._axes import LAYERS, NOWHERE, Axes
from normjax.diagnostics.lint._flow import followed
from normjax.diagnostics.lint._graph import Graph, Kind, Node
from normjax.diagnostics.lint._network import Network
from normjax.diagnostics.lint._norms import Norm

CHANNELS = (1, 2, 3, 4)  # the numbers of channels that stored images have
SQUARE = 8  # the smallest side of a square image; shorter axes may be anything
OBLONG = 32  # the smallest side of a color image that is not square

ADVICE = (
    "move the channels last, as in jnp.moveaxis(x, 1, -1); to keep them first, tell each layer: "
    "feature_axes=1 (axis=1 in linen and nnx)"
)


class Layout(NamedTuple):
    """The axes of channels and the axes of positions of an image; empty if they are unknown."""

    channels: Axes = NOWHERE
    positions: Axes = NOWHERE


def channels_first(network: Network) -> Iterator[Finding]:
    """Yields layers whose features are positions of their input."""
    graph = network.graph
    layouts = _layouts(graph)
    for node in graph.nodes:
        if node.op == "conv_general_dilated" and node.kind == Kind.DATA:
            given = node.inputs[0]
            feature = node.params["dimension_numbers"].lhs_spec[1]
            if layouts[given].channels and feature in layouts[given].positions:
                yield _finding(_path_of(network, node), graph.nodes[given], layouts[given], feature)
    for norm in network.norms:
        feature = _misread(network, norm, layouts[norm.h])
        if feature is not None:
            yield _finding(network.path(norm), graph.nodes[norm.h], layouts[norm.h], feature)


def _misread(network: Network, norm: Norm, layout: Layout) -> int | None:
    """Returns an axis of positions that a normalization takes for features, None without one."""
    sizes = network.graph.nodes[norm.h].shape
    long = frozenset(axis for axis in layout.positions if sizes[axis] > 1)
    kept = long - norm.axes
    if not layout.channels or not kept:
        return None
    mixes_channels = network.over_examples(norm) and layout.channels <= norm.axes
    # An instance norm is over all positions, a layer norm of the last axis over one of their axes.
    reads_a_row = bool(norm.axes) and norm.axes < long
    return max(kept if mixes_channels else norm.axes) if mixes_channels or reads_a_row else None


def _layouts(graph: Graph) -> list[Layout]:
    """Returns the layout of each value, from the input or the last convolution before it."""
    found: list[Layout] = []
    for node in graph.nodes:
        if node.op == "input":
            layout = _of_input(node.shape)
        elif node.kind < Kind.MASK:  # an image of integers is of the kind MASK
            layout = Layout()
        elif node.op == "conv_general_dilated":
            numbers = node.params["dimension_numbers"]
            layout = Layout(frozenset([numbers.out_spec[1]]), frozenset(numbers.out_spec[2:]))
        else:
            layout = _handed_on(graph, node, found)
        found.append(layout)
    return found


def _of_input(shape: tuple[int, ...]) -> Layout:
    """Returns the layout of images with few channels along axis 1."""
    if len(shape) != 4 or shape[1] not in CHANNELS:
        return Layout()
    is_square = shape[2] == shape[3] >= SQUARE
    is_image = is_square or (shape[1] == 3 and min(shape[2:]) >= OBLONG)
    return Layout(frozenset([1]), frozenset([2, 3])) if is_image else Layout()


def _handed_on(graph: Graph, node: Node, found: list[Layout]) -> Layout:
    if node.op in LAYERS or node.op == "carry":
        return Layout()
    for operand, given in enumerate(node.inputs):
        if found[given].channels:
            return Layout(*(followed(graph, node, operand, axes) for axes in found[given]))
    return Layout()


def _path_of(network: Network, node: Node) -> str:
    leaves = [leaf for given in node.inputs[1:] for leaf in network.graph.sources(given)]
    return network.leaves[min(leaves)].path if leaves else "a convolution"


def _finding(path: str, given: Node, layout: Layout, feature: int) -> Finding:
    (channels,) = sorted(layout.channels)[:1]
    return Finding(
        path,
        "channels-first",
        "warning",
        f"its input of shape {given.shape} has its channels along axis {channels}, but it takes "
        f"axis {feature}, of positions, for the features",
        ADVICE,
    )
