"""A traced function as one graph of values, their dependencies and their dominators."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax._jaxpr import Op, Program, makers

MIXING = {"dot_general", "conv_general_dilated", "gather"}
COLLECTIVE = ("psum", "pmax", "pmin", "ppermute", "all_gather", "all_to_all", "reduce_scatter")
# Operations whose i-th output depends on their i-th operand only.
ONE_BY_ONE = {"psum", "psum_invariant", "pmax", "pmin", "optimization_barrier", "pvary", "pcast"}
ROOT = -1


class Kind(IntEnum):
    """What a value depends on. Of several kinds, the last in this list counts."""

    CONSTANT = 0
    PARAM = 1  # variables
    MASK = 2  # integers, bools or random bits, such as labels, masks, counters and noise
    DATA = 3  # activations


class Node(NamedTuple):
    """A value, and the operation that makes it.

    Attributes:
      op: the name of the primitive; or "leaf", "input" or "constant" for a value that nothing
        makes; or "carry", "take", "stack" or "branch" for loops and conditions.
      inputs: the numbers of the values that it is made from.
      aval: its shape and dtype.
      params: the parameters of the primitive.
      eqn: the equation, or None.
      kind: what it depends on.
    """

    op: str
    inputs: tuple[int, ...]
    aval: Any
    params: Mapping[str, Any]
    eqn: Any
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the value."""
        return self.aval.shape

    @property
    def size(self) -> int:
        """Returns the number of its elements."""
        return math.prod(self.aval.shape)


class Unknown(Exception):
    """A value that is not known without running the network."""


class Graph:
    """The values of a function `(variables, x) -> (outputs, updates)`, in the order of computation.

    Attributes:
      statistics: the leaves that are running statistics.
      nodes: all values; the other attributes hold positions in this list.
      leaves: the leaves of the variables.
      inputs: the leaves of x.
      outputs: the outputs of the network.
      updates: the new statistics, in a tree.
      users: for each value, the values that are made from it.
    """

    def __init__(self, program: Program, statistics: frozenset[int] = frozenset()) -> None:
        self.statistics = statistics
        self.nodes: list[Node] = []
        self.leaves = list(program.leaves.values())
        self.inputs = list(program.inputs)
        self.users: list[list[int]] = [[] for _ in program.types]
        self._constants = program.constants
        self._above: list[int] = []  # the immediate dominators among activations
        self._depth: list[int] = []
        given = dict.fromkeys(self.leaves, "leaf") | dict.fromkeys(self.inputs, "input")
        made_by = makers(program)
        for number, aval in enumerate(program.types):
            op = made_by.get(number) or Op(given.get(number, "constant"), {}, (), ())
            self._add(number, op, aval)
        outputs, self.updates = jax.tree.unflatten(program.structure, program.outputs)
        self.outputs = jax.tree.leaves(outputs)
        self._forget_users(set(program.outputs))

    def _add(self, number: int, op: Op, aval: Any) -> None:
        inputs = _inputs(op, number)
        node = Node(op.name, inputs, aval, op.params, op.eqn, self._kind(op.name, inputs, aval))
        self.nodes.append(node)
        for given in dict.fromkeys(inputs):
            self.users[given].append(number)
        data = self.data(number) if op.name != "carry" else []
        above = functools.reduce(self.common, data) if data else ROOT
        self._above.append(above)
        self._depth.append(0 if above == ROOT else self._depth[above] + 1)

    def _forget_users(self, needed: set[int]) -> None:
        """Removes the users that the needed values do not depend on."""
        for number in range(len(self.nodes) - 1, -1, -1):
            if number in needed:
                needed.update(self.nodes[number].inputs)
        self.users = [[user for user in users if user in needed] for users in self.users]

    def data(self, number: int) -> list[int]:
        """Returns the activations that a value is made from."""
        return [given for given in self.nodes[number].inputs if self.nodes[given].kind == Kind.DATA]

    def is_param(self, number: int) -> bool:
        """Returns whether a value is made from variables, but not from activations."""
        return self.nodes[number].kind in (Kind.PARAM, Kind.MASK) and bool(self.sources(number))

    def above(self, number: int) -> int:
        """Returns the last activation on every path from the inputs to this one, or ROOT."""
        return self._above[number]

    def common(self, a: int, b: int) -> int:
        """Returns the last activation on every path from the inputs to either, or ROOT."""
        while a != b:
            if a == ROOT or b == ROOT:
                return ROOT
            if self._depth[a] >= self._depth[b]:
                a = self._above[a]
            else:
                b = self._above[b]
        return a

    def between(self, start: int, end: int, *, avoiding: int | None = None) -> set[int]:
        """Returns the activations on all paths from start to end, including end."""
        found, waiting = set(), [end]
        while waiting:
            number = waiting.pop()
            if number not in found and number != start and number != avoiding:
                found.add(number)
                waiting += self.data(number)
        return found

    def sources(self, number: int) -> frozenset[int]:
        """Returns the leaves that a value is made from, on paths without activations."""
        found, waiting = set(), [number]
        while waiting:
            number = waiting.pop()
            if number not in found and self.nodes[number].kind != Kind.DATA:
                found.add(number)
                waiting += self.nodes[number].inputs
        return frozenset(found.intersection(self.leaves))

    def value(self, number: int, given: dict[int, Any]) -> Any:
        """Computes a value, and adds what it computed to `given`; raises Unknown if it cannot."""
        if number not in given:
            given[number] = self._computed(number, given)
        return given[number]

    def _computed(self, number: int, given: dict[int, Any]) -> Any:
        node = self.nodes[number]
        if number in self._constants:
            return self._constants[number]
        if node.op in ("branch", "select_n"):
            return self._chosen(node, given)
        if node.op == "carry" or node.op in ONE_BY_ONE:  # one device takes part in a collective
            return self.value(node.inputs[0], given)
        if node.op == "take":
            return self.value(node.inputs[0], given)[0]
        if node.op == "stack":
            return self.value(node.inputs[0], given)[None]
        if node.op.startswith("all_gather") and not node.params["tiled"]:  # all devices agree
            own = self.value(node.inputs[0], given)
            own = jnp.expand_dims(own, node.params["all_gather_dimension"])
            return jnp.broadcast_to(own, node.shape)
        expensive = node.op in MIXING and node.kind == Kind.DATA
        if node.eqn is None or expensive or collective_axes(node):
            raise Unknown
        if node.eqn.primitive.multiple_results:
            raise Unknown
        values = [self.value(each, given) for each in node.inputs]
        return node.eqn.primitive.bind(*values, **node.params)

    def _chosen(self, node: Node, given: dict[int, Any]) -> Any:
        """Computes the case that a condition chooses; the last one if the condition is unknown.

        The last case is the usual one, as of the condition that a mask leaves something to count.
        """
        condition, *cases = node.inputs
        try:
            index = self.value(condition, given)
        except Unknown:
            return self.value(cases[-1], given)
        return lax.select_n(index, *(self.value(case, given) for case in cases))

    def _kind(self, op: str, inputs: Sequence[int], aval: Any) -> Kind:
        inexact = hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)
        carries_param = op == "carry" and self.nodes[inputs[0]].kind == Kind.PARAM
        if op in ("input", "carry") and not carries_param:
            return Kind.DATA if inexact else Kind.MASK
        if op == "leaf":
            return Kind.PARAM
        kinds = [self.nodes[given].kind for given in inputs]
        kind = max(kinds, default=Kind.CONSTANT)
        if op.startswith("random") or (kind == Kind.DATA and not inexact):
            return Kind.MASK
        if kind == Kind.DATA and op == "add" and any(map(self._is_old, inputs)):
            # New running statistics, which later activations do not depend on.
            return Kind.MASK
        if kind == Kind.MASK and op in MIXING and inexact and Kind.PARAM in kinds:
            return Kind.DATA  # an embedding
        return kind

    def _is_old(self, number: int) -> bool:
        """Returns whether a value is a multiple of the running statistics before the step."""
        node = self.nodes[number]
        is_multiple = node.op == "mul" and node.kind == Kind.PARAM
        return is_multiple and self.sources(number) <= self.statistics


def _inputs(op: Op, number: int) -> tuple[int, ...]:
    """Returns the values that an output of an operation is made from."""
    if op.name in ONE_BY_ONE and len(op.inputs) == len(op.outputs):
        return (op.inputs[op.outputs.index(number)],)
    return op.inputs


def collective_axes(node: Node) -> tuple[Hashable, ...]:
    """Returns the names of the mapped axes that an operation communicates over."""
    if not node.op.startswith(COLLECTIVE):
        return ()
    names = node.params.get("axis_name", node.params.get("axes", ()))
    names = names if isinstance(names, (tuple, list)) else (names,)
    return tuple(name for name in names if not isinstance(name, int))
