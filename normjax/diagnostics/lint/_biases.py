"""Finds biases that mean subtraction removes."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from normjax.diagnostics.findings import Finding
from normjax.diagnostics.lint import _flow
from normjax.diagnostics.lint._axes import LAYERS, NOWHERE, POOLING, Axes, reduced, spread
from normjax.diagnostics.lint._graph import Kind, Node, Unknown
from normjax.diagnostics.lint._network import Network
from normjax.diagnostics.lint._norms import VIEWS, Norm

# Operations f with f(x + c) = f(x) + a c, for a number a.
SUMS = ("add", "sub")
MULTIPLES = ("mul", "div")
PASSING = VIEWS | POOLING | {
    *SUMS, *MULTIPLES, "neg", "branch", "concatenate", "dynamic_slice", "pad", "rev", "slice",
    "reduce_sum", "reduce_max", "reduce_min", "psum", "psum_invariant", "all_gather",
}  # fmt: skip


def cancelled_biases(network: Network) -> Iterator[Finding]:
    """Yields the biases that mean subtraction removes on every path to the outputs."""
    graph = network.graph
    search = _Search(network)
    own = frozenset().union(*(norm.leaves for norm in network.norms))
    for leaf, name in network.leaves.items():
        norms = [] if name.collection == "batch_stats" else search.cancelling(leaf)
        # The bias of a normalization before a linear bottleneck is not a mistake of the user.
        if norms and not (leaf in own and search.passed_layers):
            norm, shape = network.path(norms[0]), graph.nodes[leaf].shape
            way = ", which reaches it through linear layers" if search.passed_layers else ""
            yield Finding(
                name.path,
                "cancelled-bias",
                "note",
                f"{norm} subtracts the mean, and so cancels {name.name!r} of shape {shape}{way}",
                "leave it out (use_bias=False); the normalization has a bias of its own",
            )


class _Search:
    """Follows a leaf that shifts activations to the normalizations that remove the shift."""

    def __init__(self, network: Network):
        self.passed_layers = False
        self.graph = network.graph
        self.varying = _flow.varying(network.graph)
        self.norms: dict[int, list[Norm]] = {}
        for norm in network.norms:
            self.norms.setdefault(norm.h, []).append(norm)

    def cancelling(self, leaf: int) -> list[Norm]:
        """Returns the normalizations that cancel a leaf; none if some of it reaches an output."""
        self.passed_layers = False
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
        if node.op in (*LAYERS, "gather"):
            return self._after_layer(node, operand, number, axes)
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

    def _after_layer(self, node: Node, operand: int, number: int, axes: Axes) -> Axes | None:
        """Returns the axes of the shift after a layer with a kernel, a resize or indexing."""
        given = self.graph.nodes[number]
        kernels = [each for each in node.inputs if each != number]
        if given.kind != Kind.DATA or len(kernels) != 1:
            return None
        (kernel,) = kernels
        if self.graph.nodes[kernel].kind == Kind.DATA:
            return None
        self.passed_layers = True
        after = spread(node, operand, given.shape, axes)
        if after is None or node.op != "dot_general":
            return after
        own = after - (spread(node, operand, given.shape, NOWHERE) or NOWHERE)
        shape = self.graph.nodes[kernel].shape
        others = self._uneven(kernel, node, operand) if not axes & reduced(node, operand) else None
        others = self.varying[kernel] if others is None else others
        fresh = spread(node, 1 - operand, shape, others) or NOWHERE
        return own | (fresh - (spread(node, 1 - operand, shape, NOWHERE) or NOWHERE))

    def _uneven(self, kernel: int, node: Node, operand: int) -> Axes | None:
        """Returns the axes along which a constant kernel's sums differ; None if it is trained.

        The weights of a resize add up to 1 everywhere, so a constant stays constant.
        """
        if self.graph.nodes[kernel].kind != Kind.CONSTANT:
            return None
        try:
            value = jnp.asarray(self.graph.value(kernel, {}))
        except Unknown:
            return None
        sums = value.sum(tuple(reduced(node, 1 - operand)), keepdims=True)
        tolerance = 1e-5 * jnp.max(jnp.abs(sums))
        apart = [jnp.max(sums, axis) - jnp.min(sums, axis) for axis in range(sums.ndim)]
        return frozenset(axis for axis, gap in enumerate(apart) if jnp.max(gap) > tolerance)
