"""Finds the normalizations in a graph: values divided by the root of their own statistic."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from normjax.diagnostics.lint._axes import REDUCING, Axes, reduced, spread
from normjax.diagnostics.lint._graph import ROOT, Graph, Kind, collective_axes

ROOTS = {"rsqrt", "sqrt", "pow"}
VIEWS = {
    "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "name",
    "optimization_barrier", "pcast", "pvary", "reduce_precision", "reshape", "shard",
    "sharding_constraint", "squeeze", "stop_gradient", "take", "transpose",
}  # fmt: skip
# Operations that combine a statistic over devices, up to a factor.
SHARED = {"psum", "psum_invariant", "all_gather"}
# Linear operations, and slices: some layers sum around the mean of a sample of the values.
LINEAR = VIEWS | SHARED | {
    "add", "sub", "neg", "mul", "div", "select_n", "branch", "dot_general", "slice",
}  # fmt: skip
ARITHMETIC = VIEWS | {"add", "sub", "mul", "div", "max", "neg", "select_n", "branch", "integer_pow"}


class Norm(NamedTuple):
    """A normalization.

    Attributes:
      h: its input.
      variance: the value that the root is taken of.
      y: the normalized value.
      end: y after scale and bias.
      axes: the axes of h that statistics are over, in whole or in part.
      values: the number of values in a statistic, over all devices that share it.
      shared: the mapped axes that the statistics are shared over.
      centered: whether the mean is subtracted.
      factors: the factors of y that depend on variables alone.
      leaves: the variables that it uses.
      inside: the activations after h, up to y.
    """

    h: int
    variance: int
    y: int
    end: int
    axes: Axes
    values: int
    shared: frozenset[Hashable]
    centered: bool
    factors: tuple[int, ...]
    leaves: frozenset[int]
    inside: set[int]


def find_norms(graph: Graph, sizes: dict[Hashable, int]) -> list[Norm]:
    """Returns the normalizations in the order of the graph.

    Args:
      graph: the graph.
      sizes: the sizes of the mapped axes by name.
    """
    found: dict[int, Norm] = {}
    for number, node in enumerate(graph.nodes):
        if node.op in ROOTS and node.kind == Kind.DATA:
            for norm in _from_root(graph, number, sizes):
                found.setdefault(norm.y, norm)
    return list(found.values())


def _from_root(graph: Graph, root: int, sizes: dict[Hashable, int]) -> Iterator[Norm]:
    """Follows the root of a variance to the values that are multiplied by its inverse."""
    (variance, *_) = graph.data(root)
    waiting: list[tuple[int, bool, tuple[int, ...]]] = [(root, _is_inverse(graph, root), ())]
    seen = set()
    while waiting:
        number, inverse, scales = waiting.pop()
        for user in graph.users[number]:
            op = graph.nodes[user].op
            if user in seen or op not in ARITHMETIC or graph.nodes[user].kind != Kind.DATA:
                continue
            seen.add(user)
            inputs = graph.nodes[user].inputs
            others = [each for each in inputs if each != number]
            is_divisor = op == "div" and inputs[0] != number
            multiplies = (op == "mul" and inverse) or (is_divisor and not inverse)
            if multiplies and len(graph.data(user)) == 2 and len(others) == 1:
                norm = _norm(graph, variance, user, others[0], scales, sizes)
                if norm is not None:
                    yield norm
                    continue
            inverts = op == "integer_pow" and graph.nodes[user].params["y"] < 0
            factors = [each for each in others if graph.nodes[each].kind != Kind.CONSTANT]
            more = (*scales, *factors) if op == "mul" else scales
            waiting.append((user, inverse ^ (is_divisor or inverts), more))


def _is_inverse(graph: Graph, root: int) -> bool:
    node = graph.nodes[root]
    exponent = node.inputs[-1]
    known = node.op == "pow" and graph.nodes[exponent].kind == Kind.CONSTANT
    return node.op == "rsqrt" or (known and bool(graph.value(exponent, {}) < 0))


def _norm(
    graph: Graph,
    variance: int,
    y: int,
    centered: int,
    scales: tuple[int, ...],
    sizes: dict[Hashable, int],
) -> Norm | None:
    """Returns the normalization of a centered value by the root of a variance, if it is one."""
    h = graph.common(variance, centered)
    if h == ROOT or h == variance or graph.nodes[h].size != graph.nodes[centered].size:
        return None
    if not _has_reduction(graph, graph.between(h, variance)):
        return None
    h = _uncentered(graph, h)
    y = _shifted(graph, h, y)
    measuring = graph.between(h, variance)
    around = graph.between(h, y, avoiding=variance)
    end, more, biases = _affine(graph, y)
    shared, devices = _sharing(graph, measuring, sizes)
    inside = measuring | around
    inputs = [given for number in inside for given in graph.nodes[number].inputs]
    params = [given for given in inputs if graph.is_param(given)]
    factors = tuple(number for number in (*scales, *more) if graph.is_param(number))
    smallest = min(graph.nodes[number].size for number in measuring)
    sources = [graph.sources(number) for number in (*params, *more, *biases)]
    return Norm(
        h=h,
        variance=variance,
        y=y,
        end=end,
        axes=_measured_axes(graph, h, measuring),
        values=devices * graph.nodes[h].size // max(1, smallest),
        shared=shared,
        centered=bool(_means(graph, h, inside) & around),
        factors=factors,
        leaves=frozenset().union(*sources),
        inside=inside,
    )


def _has_reduction(graph: Graph, region: set[int]) -> bool:
    ops = {graph.nodes[number].op for number in region}
    return bool(ops & (REDUCING | {"dot_general"}))


def _uncentered(graph: Graph, h: int) -> int:
    """Returns the value before its mean was subtracted, if the variance is measured later."""
    above = graph.above(h)
    is_difference = graph.nodes[h].op in ("add", "sub") and len(graph.data(h)) == 2
    if not is_difference or above == ROOT or graph.nodes[above].size != graph.nodes[h].size:
        return h
    region = graph.between(above, h)
    subtracts_mean = bool(_means(graph, above, region) & set(graph.data(h)))
    return above if _measures(graph, region) and subtracts_mean else h


def _shifted(graph: Graph, h: int, y: int) -> int:
    """Returns the value after a multiple of the mean is subtracted from y; y if none is."""
    if len(users := graph.users[y]) != 1 or graph.nodes[users[0]].op not in ("add", "sub"):
        return y
    others = [number for number in graph.data(users[0]) if number != y]
    if len(others) != 1 or graph.common(h, others[0]) != h:
        return y
    region = graph.between(h, others[0])
    return users[0] if _measures(graph, region) and _means(graph, h, region) else y


def _measures(graph: Graph, region: set[int]) -> bool:
    """Returns whether all operations of a region are of kinds that compute statistics."""
    ops = {graph.nodes[number].op for number in region}
    return ops <= ARITHMETIC | REDUCING | ROOTS | SHARED | {"square"}


def _means(graph: Graph, h: int, region: set[int]) -> set[int]:
    """Returns the values of a region that are sums of h, or multiples of sums, in any layout."""
    linear, means = {h}, set()
    for number in sorted(region):
        node, data = graph.nodes[number], graph.data(number)
        product = node.op in ("mul", "dot_general") and len(data) > 1
        divisor = node.op == "div" and graph.nodes[node.inputs[1]].kind == Kind.DATA
        if node.op not in LINEAR | {"reduce_sum"} or product or divisor:
            continue
        known = linear.intersection(data)
        if known and (known == set(data) or node.op == "branch"):
            linear.add(number)
            if node.op in ("reduce_sum", "dot_general") or means & set(data):
                means.add(number)
    # The difference of an activation and its mean is not a mean.
    size = graph.nodes[h].size
    return {
        number
        for number in means
        if graph.nodes[number].size < size or not _subtracts(graph, number)
    }


def _subtracts(graph: Graph, number: int) -> bool:
    return graph.nodes[number].op in ("add", "sub") and len(graph.data(number)) == 2


def _measured_axes(graph: Graph, h: int, region: set[int]) -> Axes:
    """Returns the axes of h that are summed over on the path to a variance."""
    rank = len(graph.nodes[h].shape)
    places = {h: [frozenset([axis]) for axis in range(rank)]}
    measured = set()
    for number in sorted(region):
        node = graph.nodes[number]
        places[number] = [frozenset()] * rank
        for operand, given in enumerate(node.inputs):
            if given not in places:
                continue
            shape = graph.nodes[given].shape
            for axis, at in enumerate(places[given]):
                if at & reduced(node, operand):
                    measured.add(axis)
                after = spread(node, operand, shape, at) if at else None
                places[number][axis] |= after or frozenset()
    return frozenset(measured)


def _sharing(
    graph: Graph, region: set[int], sizes: dict[Hashable, int]
) -> tuple[frozenset[Hashable], int]:
    """Returns the mapped axes that devices share statistics over, and how many share them."""
    shared: dict[Hashable, int] = {}
    for number in region:
        node = graph.nodes[number]
        groups = node.params.get("axis_index_groups")
        for name in collective_axes(node):
            shared[name] = len(groups[0]) if groups else sizes.get(name, 1)
    return frozenset(shared), math.prod(shared.values())


def _affine(graph: Graph, y: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Returns the value after scale and bias of y, the factors and the biases."""
    scales, biases = [], []
    while len(users := graph.users[y]) == 1 and y not in graph.outputs:
        (user,) = users
        node = graph.nodes[user]
        others = [given for given in node.inputs if given != y]
        params = [given for given in others if graph.is_param(given)]
        if node.op in VIEWS:
            pass
        elif node.op == "mul" and params:
            scales += params
        elif node.op == "add" and params:
            biases += params
        else:
            break
        y = user
    return y, tuple(scales), tuple(biases)
