"""The rules about single normalizations; each yields its findings."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax.numpy as jnp

from normjax.diagnostics.findings import Finding
from normjax.diagnostics.lint import _flow
from normjax.diagnostics.lint._axes import LAYERS
from normjax.diagnostics.lint._graph import ROOT, Graph, Unknown
from normjax.diagnostics.lint._network import Network
from normjax.diagnostics.lint._norms import VIEWS, Norm

FEWEST = 16  # the fewest values in a statistic without a warning
HALF = 0.5  # with a smaller momentum, the last batch outweighs all batches before it
REMAINDER = 0.01  # the largest weight of the initial statistics after training without a warning


def dropout_before(network: Network) -> Iterator[Finding]:
    """Yields batch norms after dropout with at most one linear layer between them."""
    dropped = _flow.dropouts(network.graph, network.examples)
    ends = {norm.y for norm in network.norms}
    for norm in network.norms:
        between = _layers_back_to(network.graph, norm.h, dropped, ends)
        if between is not None and network.over_examples(norm):
            layers = "one linear layer" if between else "no linear layer"
            yield Finding(
                network.path(norm),
                "dropout-before",
                "warning",
                f"dropout comes before it, with {layers} between: its variance is larger in "
                "training than at inference",
                "move the dropout after the last batch norm",
            )


def _layers_back_to(graph: Graph, start: int, wanted: set[int], ends: set[int]) -> int | None:
    """Returns the number of linear layers back to a wanted value; None if it is above 1."""
    waiting, seen = [(start, 0)], set()
    while waiting:
        number, layers = min(waiting, key=lambda each: each[1])
        waiting.remove((number, layers))
        if number in wanted:
            return layers
        node = graph.nodes[number]
        if number in seen or number in ends or node.op == "carry":
            continue
        seen.add(number)
        layers += node.op in LAYERS
        if layers <= 1 and not (node.op in LAYERS and len(graph.data(number)) > 1):
            waiting += [(given, layers) for given in graph.data(number)]
    return None


def few_values(network: Network) -> Iterator[Finding]:
    """Yields batch norms whose statistics are each over few values."""
    for norm in network.norms:
        values, shape = norm.values, network.graph.nodes[norm.h].shape
        if values < FEWEST and network.over_examples(norm):
            several = values > 1
            off = f"off by about {math.sqrt(2 / (values - 1)):.0%}" if several else "always 0"
            yield Finding(
                network.path(norm),
                "few-values",
                "warning" if several else "error",
                f"its input of shape {shape} has {values} value{'s' * several} for each "
                f"statistic{_devices(norm)}: variances are {off}",
                "use a larger batch, share statistics over devices (axis_name), or use group norm "
                "or batch renorm",
            )


def _devices(norm: Norm) -> str:
    names = ", ".join(sorted(map(repr, norm.shared)))
    return f", over all of {names}" if names else ""


def slow_momentum(network: Network, steps: int) -> Iterator[Finding]:
    """Yields batch norms whose running statistics training leaves too near their initial values."""
    for norm in network.norms:
        momentum = network.momenta.get(norm.y, 0.0)
        if momentum < 1 and momentum**steps > REMAINDER:
            fast = math.floor(100 * REMAINDER ** (1 / steps)) / 100
            yield Finding(
                network.path(norm),
                "slow-momentum",
                "warning",
                f"after {steps} steps of momentum {momentum:.4g}, {momentum**steps:.0%} of its "
                "running statistics are their initial value",
                f"use momentum={fast:g} or less, momentum=None (the mean over all batches), or "
                "recalibrate at the end",
            )


def torch_momentum(network: Network) -> Iterator[Finding]:
    """Yields batch norms whose momentum gives the last batch most weight, as PyTorch's would."""
    for norm in network.norms:
        momentum = network.momenta.get(norm.y, 0.0)
        # A momentum of 0 stores the statistics of the batch on purpose, as for microbatches.
        if 0 < momentum < HALF and not network.is_scheduled(norm):
            yield Finding(
                network.path(norm),
                "torch-momentum",
                "warning",
                f"its momentum {momentum:.4g} is the weight of the old value, so "
                f"{1 - momentum:.0%} of its running statistics come from the last batch",
                f"write {1 - momentum:.4g} if {momentum:.4g} is from PyTorch, whose momentum is "
                "the weight of the batch",
            )


def unsynced(network: Network) -> Iterator[Finding]:
    """Yields batch norms with statistics of one device whose examples are on several."""
    for norm in network.norms:
        names = network.devices[norm.h] - norm.shared
        updates = [network.updates[layer] for layer in network.running(norm)]
        merged = any(not names & network.devices[update] for update in updates)
        if names and network.over_examples(norm) and not merged:
            listed = ", ".join(sorted(map(repr, names)))
            yield Finding(
                network.path(norm),
                "unsynced",
                "warning",
                f"the examples are split over the mapped axis {listed}, but each device has its "
                "own statistics",
                f"pass axis_name={listed} to it, or merge the statistics with nj.sync_batch_stats",
            )


def residual_scales(network: Network) -> Iterator[Finding]:
    """Yields normalizations that end a residual branch and start with a scale of 1."""
    for norm in network.norms:
        if _ends_a_branch(network.graph, norm) and _is_one(network, norm):
            yield Finding(
                network.path(norm),
                "residual-scale",
                "note",
                "it ends a residual branch, and its scale starts at 1: the block does not start as "
                "the identity",
                "start it at zero: scale_init=jax.nn.initializers.zeros",
            )


def _is_one(network: Network, norm: Norm) -> bool:
    try:
        factors = network.factors(norm)
    except Unknown:
        return False
    return bool(factors) and all(bool(jnp.all(factor == 1)) for factor in factors)


def _ends_a_branch(graph: Graph, norm: Norm) -> bool:
    """Returns whether its output is added directly to a shortcut from the branch's input."""
    end = norm.end
    while len(users := graph.users[end]) == 1 and graph.nodes[users[0]].op in VIEWS:
        end = users[0]
    if len(users) != 1 or graph.nodes[users[0]].op != "add" or len(graph.data(users[0])) != 2:
        return False
    above = graph.above(users[0])
    (other,) = (given for given in graph.data(users[0]) if given != end)
    if above == ROOT:
        return False
    branch, shortcut = _most_layers(graph, above, end), _most_layers(graph, above, other)
    return shortcut <= 1 and shortcut < branch


def _most_layers(graph: Graph, start: int, end: int) -> int:
    """Returns the number of linear layers on the longest path between two values."""
    most = {start: 0}
    for number in sorted(graph.between(start, end)):
        is_layer = graph.nodes[number].op in LAYERS and len(graph.data(number)) == 1
        before = [most.get(given, 0) for given in graph.data(number)]
        most[number] = is_layer + max(before, default=0)
    return most[end]
