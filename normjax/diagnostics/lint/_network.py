"""A traced network, and the facts about it that the rules need."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from normjax.diagnostics.lint import _flow
from normjax.diagnostics.lint._graph import ROOT, Unknown
from normjax.diagnostics.lint._model import Leaf, Model, names_in
from normjax.diagnostics.lint._norms import Norm, find_norms
from normjax.diagnostics.lint._trace import trace


class Network:
    """A traced network.

    Attributes:
      graph: its values.
      leaves: the names of the variables, by their positions in the graph.
      norms: its normalizations.
      examples: for each value, the axes of the examples.
      devices: for each value, the mapped axes over which it may differ.
      sizes: the sizes of the mapped axes.
      updates: the positions of the updated statistics in the graph, by their names.
    """

    def __init__(self, model: Model, x: Any, sizes: Mapping[Hashable, int]):
        self.sizes = dict(sizes)
        statistics = [i for i, leaf in enumerate(model.names) if leaf.is_statistic]
        axes = tuple(sizes.items())
        variables = model.variables
        self.graph = trace(model.function, variables, x, axes=axes, statistics=statistics)
        self.leaves = dict(zip(self.graph.leaves, model.names, strict=True))
        self.norms = find_norms(self.graph, self.sizes)
        self.examples = _flow.examples(self.graph)
        self.devices = _flow.devices(self.graph, frozenset(sizes))
        self._values: dict[int, Any] = {}
        for leaf, value in zip(self.graph.leaves, jax.tree.leaves(variables), strict=True):
            if not isinstance(value, jax.ShapeDtypeStruct):
                self._values[leaf] = value
        updates = self.graph.updates
        names = names_in("batch_stats", updates)
        self.updates = dict(zip(names, jax.tree.leaves(updates), strict=True))
        self._running = self._find_running()

    def path(self, norm: Norm) -> str:
        """Returns the path of a normalization's variables, or of its call if it has none."""
        own = [self.leaves[leaf] for leaf in sorted(norm.leaves)]
        layers = [leaf for leaf in own if leaf.collection == "params"] or self.running(norm) or own
        if layers:
            return layers[0].path
        called = str(self.graph.nodes[norm.variance].eqn.source_info.name_stack)
        return called or f"normalization {self.norms.index(norm)}"

    def running(self, norm: Norm) -> list[Leaf]:
        """Returns the running statistics of a normalization."""
        return self._running.get(norm.y, [])

    def over_examples(self, norm: Norm) -> bool:
        """Returns whether statistics combine several examples, as in batch norm."""
        return bool(self.examples[norm.h] & norm.axes or norm.shared or self.running(norm))

    def factors(self, norm: Norm, *, zeros: bool = False) -> list[Array]:
        """Returns what y is multiplied by, or with `zeros` what it would be if variables were 0.

        Raises Unknown if that depends on activations.
        """
        given: dict[int, Any] = dict(self._values)
        if zeros:
            given |= {leaf: jnp.zeros_like(self.graph.nodes[leaf].aval) for leaf in norm.leaves}
        return [self.graph.value(number, given) for number in norm.factors]

    @cached_property
    def momenta(self) -> dict[int, float]:
        """Returns the momenta that are known, by the y of their normalization."""
        norms = [norm for norm in self.norms if self.running(norm)]
        found = jax.jit(lambda: {norm.y: self._momentum(norm) for norm in norms})()
        return {y: float(momentum) for y, momentum in found.items() if not jnp.isnan(momentum)}

    def is_scheduled(self, norm: Norm) -> bool:
        """Returns whether the momentum depends on variables, such as a count of batches."""
        layer, leaf = self._first_running(norm)
        found, waiting = set(), [self.updates[layer]]
        while waiting:
            number = waiting.pop()
            if number not in found and number not in norm.inside | {norm.h, leaf}:
                found.add(number)
                waiting += self.graph.nodes[number].inputs
        return not found.isdisjoint(self.graph.leaves)

    def _first_running(self, norm: Norm) -> tuple[Leaf, int]:
        """Returns the name and the number of the first of a normalization's running statistics."""
        layer = self.running(norm)[0]
        (leaf,) = (leaf for leaf, name in self.leaves.items() if name == layer)
        return layer, leaf

    def _momentum(self, norm: Norm) -> Array:
        """Returns how far updated statistics move with old ones, NaN if it is unknown.

        Activations are constant meanwhile, so the difference is the momentum.
        """
        layer, leaf = self._first_running(norm)
        given = dict(self._values)
        for number in (norm.h, *norm.inside):
            given[number] = jnp.full_like(self.graph.nodes[number].aval, 2)
        updated, old = self.updates[layer], self.graph.nodes[leaf].aval
        try:
            from_zero = self.graph.value(updated, given | {leaf: jnp.zeros_like(old)})
            from_one = self.graph.value(updated, given | {leaf: jnp.ones_like(old)})
        except Unknown:
            return jnp.array(jnp.nan)
        return jnp.max(from_one - from_zero)

    def _find_running(self) -> dict[int, list[Leaf]]:
        """Returns the running statistics that each normalization measures, by its y."""
        found: dict[int, list[Leaf]] = {}
        by_name = sorted(self.leaves.items(), key=lambda each: each[1].name)  # "mean" before "var"
        for leaf, layer in by_name:
            if layer.is_statistic and layer in self.updates:
                meetings = self._meetings(leaf, self.updates[layer])
                owners = [self._measuring(meeting) for meeting in meetings]
                for owner in dict.fromkeys(owners):
                    if owner is not None:
                        found.setdefault(owner, []).append(layer)
        return found

    def _meetings(self, leaf: int, update: int) -> list[int]:
        """Returns the values at which a leaf and activations are first combined.

        A layer that is called twice updates its statistics twice, so the search goes on from the
        first such value to the update.
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
        """Returns a value and all values that it is made from."""
        found, waiting = {number}, [number]
        while waiting:
            new = set(self.graph.nodes[waiting.pop()].inputs) - found
            found |= new
            waiting += new
        return found

    def _measuring(self, number: int) -> int | None:
        """Returns the y of the last normalization that a value is computed in or after."""
        while number != ROOT:
            for norm in self.norms:
                if number == norm.h or number in norm.inside:
                    return norm.y
            number = self.graph.above(number)
        return None
