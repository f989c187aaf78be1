"""Biases that are subtracted again."""

from __future__ import annotations

from collections.abc import Iterator

from normjax.diagnostics._findings import Finding
from normjax.diagnostics._lint import flow
from normjax.diagnostics._lint.axes import POOLING, Axes, spread
from normjax.diagnostics._lint.graph import Kind
from normjax.diagnostics._lint.network import Network
from normjax.diagnostics._lint.norms import VIEWS, Norm

# What passes a constant on: f(x + c) = f(x) + c, or plus a multiple of it. Layers end what is
# "right behind".
SUMS = ("add", "sub")
MULTIPLES = ("mul", "div")
PASSING = VIEWS | POOLING | {
    *SUMS, *MULTIPLES, "neg", "branch", "concatenate", "dynamic_slice", "pad", "rev", "slice",
    "reduce_sum", "reduce_max", "reduce_min", "psum", "psum_invariant", "all_gather",
}  # fmt: skip


def cancelled_biases(network: Network) -> Iterator[Finding]:
    """Yields biases that reach nothing but normalizations which subtract them."""
    graph = network.graph
    search = _Search(network)
    for leaf, name in network.leaves.items():
        if name.collection != "batch_stats" and (norms := search.cancelling(leaf)):
            norm = network.path(norms[0])
            yield Finding(
                name.path,
                "cancelled-bias",
                "note",
                f"{norm} subtracts the mean, and so cancels {name.name!r} of shape {graph.nodes[leaf].shape}",
                "leave it out (use_bias=False); the normalization has a bias of its own",
            )


class _Search:
    """Follows what adds a leaf to wherever it goes."""

    def __init__(self, network: Network):
        self.graph = network.graph
        self.varying = flow.varying(network.graph)
        self.norms: dict[int, list[Norm]] = {}
        for norm in network.norms:
            self.norms.setdefault(norm.h, []).append(norm)

    def cancelling(self, leaf: int) -> list[Norm]:
        """Returns the normalizations that cancel a leaf; none if it gets past them, or is no bias."""
        found: list[Norm] = []
        waiting = [(leaf, self.varying[leaf])]
        seen = set()
        while waiting:
            number, axes = waiting.pop()
            if (number, axes) in seen:
                continue
            seen.add((number, axes))
            if number in self.graph.outputs:
                return []
            cancelling = [
                norm
                for norm in self.norms.get(number, ())
                if norm.centered and not norm.axes & axes
            ]
            found += cancelling
            for user in self.graph.users[number]:
                if (
                    any(user in norm.inside for norm in cancelling)
                    or self.graph.nodes[user].op == "is_finite"
                ):
                    continue
                after = self._after(number, user, axes)
                if after is None:
                    return []
                waiting.append((user, after))
        return found

    def _after(self, number: int, user: int, axes: Axes) -> Axes | None:
        """Returns the axes along which the shift varies behind an operation; None where it is a shift no more."""
        node = self.graph.nodes[user]
        if node.kind != Kind.DATA:
            return self.varying[user]
        others = [given for given in node.inputs if given != number]
        operand = node.inputs.index(number)
        if (
            node.op not in PASSING
            or (node.op == "branch" and operand == 0)
            or (node.op == "div" and operand == 1)
        ):
            return None
        if node.op in MULTIPLES:
            if (
                len(self.graph.data(user)) != 1
                or len(others) != 1
                or self.graph.nodes[number].kind != Kind.DATA
            ):
                return None
            axes = axes | self.varying[others[0]]
        if self.graph.nodes[number].kind != Kind.DATA and node.op not in SUMS:
            return None
        return spread(node, operand, self.graph.nodes[number].shape, axes)
