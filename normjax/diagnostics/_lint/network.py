"""A traced network, and the questions that rules ask about it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from normjax.diagnostics._lint import flow
from normjax.diagnostics._lint.graph import ROOT, Unknown
from normjax.diagnostics._lint.model import Leaf, Model, names_in
from normjax.diagnostics._lint.norms import Norm, find_norms
from normjax.diagnostics._lint.trace import trace


class Network:
    """A traced network.

    Attributes:
      graph: its values.
      leaves: the names of the variables, by their values in the graph.
      norms: its normalizations.
      examples: by value, the axes along which examples lie.
      devices: by value, the mapped axes over which it may differ.
      sizes: of the mapped axes.
    """

    def __init__(self, model: Model, x: Any, sizes: Mapping[Hashable, int]):
        self.sizes = dict(sizes)
        statistics = [i for i, leaf in enumerate(model.names) if leaf.is_statistic]
        self.graph = trace(
            model.function, model.variables, x, axes=tuple(sizes.items()), statistics=statistics
        )
        self.leaves = dict(zip(self.graph.leaves, model.names, strict=True))
        self.norms = find_norms(self.graph, self.sizes)
        self.examples = flow.examples(self.graph)
        self.devices = flow.devices(self.graph, frozenset(sizes))
        values = zip(self.graph.leaves, jax.tree.leaves(model.variables), strict=True)
        self._values = {
            leaf: value for leaf, value in values if not isinstance(value, jax.ShapeDtypeStruct)
        }
        updates = self.graph.updates
        names = names_in("batch_stats", updates)
        self.updates = dict(zip(names, jax.tree.leaves(updates), strict=True))
        self._running = self._find_running()

    def path(self, norm: Norm) -> str:
        """Returns the path of a normalization: of its scale and bias, of its statistics, or where it was called."""
        own = [self.leaves[leaf] for leaf in sorted(norm.leaves)]
        layers = [leaf for leaf in own if leaf.collection == "params"] or self.running(norm) or own
        if layers:
            return layers[0].path
        called = str(self.graph.nodes[norm.variance].eqn.source_info.name_stack)
        return called or f"normalization {self.norms.index(norm)}"

    def running(self, norm: Norm) -> list[Leaf]:
        """Returns the running statistics that follow those of a normalization."""
        return self._running.get(norm.y, [])

    def over_examples(self, norm: Norm) -> bool:
        """Whether statistics are of several examples together, as those of batch norm are."""
        return bool(self.examples[norm.h] & norm.axes or norm.shared or self.running(norm))

    def factors(self, norm: Norm, *, zeros: bool = False) -> list[Array]:
        """Returns what y is multiplied by, or what that would be if its variables were 0; or raises Unknown."""
        given: dict[int, Any] = dict(self._values)
        if zeros:
            given |= {leaf: jnp.zeros_like(self.graph.nodes[leaf].aval) for leaf in norm.leaves}
        return [self.graph.value(number, given) for number in norm.factors]

    def momenta(self) -> dict[int, float]:
        """Returns the weight of the old running statistics in the new ones, by y, where it is known."""
        found = jax.jit(
            lambda: {norm.y: self._momentum(norm) for norm in self.norms if self.running(norm)}
        )()
        return {y: float(momentum) for y, momentum in found.items() if not jnp.isnan(momentum)}

    def _momentum(self, norm: Norm) -> Array:
        """Returns by how much the new statistics move with the old, whatever is measured; NaN where that is unknown."""
        layer = self.running(norm)[0]
        (leaf,) = (leaf for leaf, name in self.leaves.items() if name == layer)
        measured = {
            number: jnp.full_like(self.graph.nodes[number].aval, 2)
            for number in (norm.h, *norm.inside)
        }
        try:
            zero, one = (
                self.graph.value(
                    self.updates[layer],
                    self._values | measured | {leaf: make(self.graph.nodes[leaf].aval)},
                )
                for make in (jnp.zeros_like, jnp.ones_like)
            )
        except Unknown:
            return jnp.array(jnp.nan)
        return jnp.max(one - zero)

    def _find_running(self) -> dict[int, list[Leaf]]:
        """Goes from old statistics to what they are put together with, and back to what measured that."""
        found: dict[int, list[Leaf]] = {}
        # means before variances
        for leaf, layer in sorted(self.leaves.items(), key=lambda each: each[1].name):
            if layer.is_statistic and layer in self.updates:
                owners = [
                    owner
                    for meeting in self._meetings(leaf, self.updates[layer])
                    if (owner := self._measuring(meeting)) is not None
                ]
                for owner in dict.fromkeys(owners):
                    found.setdefault(owner, []).append(layer)
        return found

    def _meetings(self, leaf: int, update: int) -> list[int]:
        """Returns what is made from a leaf and from activations at once.

        A layer that is called twice updates its statistics twice. So the first meeting is followed
        on the way to the update.
        """
        on_the_way = self._sources(update)
        size = self.graph.nodes[leaf].size
        found, waiting = set(), [leaf]
        while waiting:
            for user in self.graph.users[waiting.pop()]:
                if user in found:
                    continue
                found.add(user)
                updated = user in on_the_way and self.graph.nodes[user].size == size
                if updated or not self.graph.data(user):
                    waiting.append(user)
        return sorted(user for user in found if self.graph.data(user))

    def _sources(self, number: int) -> set[int]:
        """Returns a value and all that it is made from."""
        found, waiting = {number}, [number]
        while waiting:
            new = set(self.graph.nodes[waiting.pop()].inputs) - found
            found |= new
            waiting += new
        return found

    def _measuring(self, number: int) -> int | None:
        """Returns which normalization measured what a value is made from, by its y."""
        while number != ROOT:
            for norm in self.norms:
                if number == norm.h or number in norm.inside:
                    return norm.y
            number = self.graph.above(number)
        return None
