"""Finds biases that mean subtraction removes."""

from __future__ import annotations

from collections.abc import Iterator

from normjax.diagnostics._findings import Finding
from normjax.diagnostics._lint import flow
from normjax.diagnostics._lint.axes import POOLING, Axes, spread
from normjax.diagnostics._lint.graph import Kind
from normjax.diagnostics._lint.network import Network
from normjax.diagnostics._lint.norms import VIEWS, Norm

# Operations with f(x + c) = f(x) + c, or plus a multiple of c. Linear layers end the search.
SUMS = ("add", "sub")
MULTIPLES = ("mul", "div")
PASSING = VIEWS | POOLING | {
    *SUMS, *MULTIPLES, "neg", "branch", "concatenate", "dynamic_slice", "pad", "rev", "slice",
    "reduce_sum", "reduce_max", "reduce_min", "psum", "psum_invariant", "all_gather",
}  # fmt: skip


def cancelled_biases(network: Network) -> Iterator[Finding]:
    """Yields biases that only reach normalizations, which subtract them."""
    graph = network.graph
    search = _Search(network)
    for leaf, name in network.leaves.items():
        norms = [] if name.collection == "batch_stats" else search.cancelling(leaf)
        if norms:
            norm, shape = network.path(norms[0]), graph.nodes[leaf].shape
            yield Finding(
                name.path,
                "cancelled-bias",
                "note",
                f"{norm} subtracts the mean, and so cancels {name.name!r} of shape {shape}",
                "leave it out (use_bias=False); the normalization has a bias of its own",
            )


class _Search:
    """Follows a leaf that is added to activations."""

    def __init__(self, network: Network):
        self.graph = network.graph
        self.varying = flow.varying(network.graph)
        self.norms: dict[int, list[Norm]] = {}
        for norm in network.norms:
            self.norms.setdefault(norm.h, []).append(norm)

    def cancelling(self, leaf: int) -> list[Norm]:
        """Returns the normalizations that cancel a leaf; none unless they remove all of it."""
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
            norms = [norm for norm in self.norms.get(number, ()) if norm.centered]
            cancelling = [norm for norm in norms if not norm.axes & axes]
            found += cancelling
            for user in self.graph.users[number]:
                cancelled = any(user in norm.inside for norm in cancelling)
                if cancelled or self.graph.nodes[user].op == "is_finite":
                    continue
                after = self._after(number, user, axes)
                if after is None:
                    return []
                waiting.append((user, after))
        return found

    def _after(self, number: int, user: int, axes: Axes) -> Axes | None:
        """Returns the axes along which the shift varies after an operation.

        None means that the result is not a shift of the same activations.
        """
        node, given = self.graph.nodes[user], self.graph.nodes[number]
        if node.kind != Kind.DATA:
            return self.varying[user]
        others = [each for each in node.inputs if each != number]
        operand = node.inputs.index(number)
        is_condition = node.op == "branch" and operand == 0
        is_divisor = node.op == "div" and operand == 1
        if node.op not in PASSING or is_condition or is_divisor:
            return None
        if given.kind != Kind.DATA and node.op not in SUMS:
            return None
        if node.op in MULTIPLES:
            if len(self.graph.data(user)) != 1 or len(others) != 1:
                return None
            axes = axes | self.varying[others[0]]
        return spread(node, operand, given.shape, axes)
