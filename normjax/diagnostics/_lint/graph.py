"""A traced function as one graph of values: calls, branches and loops written out, and who dominates whom."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import PyTree

# What becomes of several operands, each by itself.
ONE_BY_ONE = {"psum", "psum_invariant", "pmax", "pmin", "optimization_barrier", "pvary", "pcast"}
MIXING = {"dot_general", "conv_general_dilated", "gather"}
ROOT = -1


class Kind(IntEnum):
    """What a value depends on; of several, it is the last that counts."""

    CONSTANT = 0
    PARAM = 1  # variables
    MASK = 2  # also on integers, bools or random bits: labels, masks, counters, noise
    DATA = 3  # on activations


class Node(NamedTuple):
    """A value, and what makes it.

    Attributes:
      op: the primitive, or one of: leaf, input, constant; carry, take, stack, branch (of loops and conditions).
      inputs: the values that it is made from.
      aval: its shape and dtype.
      params: of the primitive.
      eqn: the equation; None where there is none.
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
        """Of the value."""
        return self.aval.shape

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.aval.shape)


class Unknown(Exception):
    """A value that cannot be had without running the network."""


class Graph:
    """The values of a function `(variables, x) -> (outputs, updates)`, in the order in which they are made.

    Attributes:
      nodes: the values.
      leaves: those that are leaves of the variables.
      inputs: those that are leaves of x.
      outputs: those that are returned as the network's outputs.
      updates: those that are returned as new statistics.
      users: by value, those that are made from it.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.leaves: list[int] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.updates: list[int] = []
        self.users: list[list[int]] = []
        self._constants: dict[int, Any] = {}
        self._above: list[int] = []  # the immediate dominator among activations
        self._depth: list[int] = []

    def add(self, op: str, inputs: Sequence[int], aval: Any, params: Mapping[str, Any] = {}, eqn: Any = None) -> int:
        """Adds a value and returns its number."""
        number = len(self.nodes)
        node = Node(op, tuple(inputs), aval, params, eqn, self._kind(op, inputs, aval))
        self.nodes.append(node)
        self.users.append([])
        for given in dict.fromkeys(inputs):
            self.users[given].append(number)
        above = functools.reduce(self.common, self.data(number)) if self.data(number) and op != "carry" else ROOT
        self._above.append(above)
        self._depth.append(0 if above == ROOT else self._depth[above] + 1)
        return number

    def constant(self, value: Any, aval: Any) -> int:
        """Adds a value that is known."""
        number = self.add("constant", (), aval)
        self._constants[number] = value
        return number

    def data(self, number: int) -> list[int]:
        """Returns the activations that a value is made from."""
        return [given for given in self.nodes[number].inputs if self.nodes[given].kind == Kind.DATA]

    def is_param(self, number: int) -> bool:
        """Whether a value is made from variables, and neither from activations nor at random."""
        return self.nodes[number].kind in (Kind.PARAM, Kind.MASK) and bool(self.sources(number))

    def above(self, number: int) -> int:
        """Returns the last activation that all of the data passes on its way to this one; ROOT for none."""
        return self._above[number]

    def common(self, a: int, b: int) -> int:
        """Returns the last activation that all of the data passes on its way to either."""
        while a != b:
            if a == ROOT or b == ROOT:
                return ROOT
            if self._depth[a] >= self._depth[b]:
                a = self._above[a]
            else:
                b = self._above[b]
        return a

    def between(self, start: int, end: int, *, avoiding: int | None = None) -> set[int]:
        """Returns the activations on the ways from one to the other, the latter included."""
        found, waiting = set(), [end]
        while waiting:
            number = waiting.pop()
            if number not in found and number != start and number != avoiding:
                found.add(number)
                waiting += self.data(number)
        return found

    def sources(self, number: int) -> frozenset[int]:
        """Returns the leaves that a value is made from, other than by way of activations."""
        found, waiting = set(), [number]
        while waiting:
            number = waiting.pop()
            if number not in found and self.nodes[number].kind != Kind.DATA:
                found.add(number)
                waiting += self.nodes[number].inputs
        return frozenset(found.intersection(self.leaves))

    def value(self, number: int, given: dict[int, Any]) -> Any:
        """Computes a value from those that are given, to which it adds what it had to compute; or raises Unknown."""
        if number not in given:
            given[number] = self._computed(number, given)
        return given[number]

    def _computed(self, number: int, given: dict[int, Any]) -> Any:
        node = self.nodes[number]
        if number in self._constants:
            return self._constants[number]
        if node.op == "carry":
            return self.value(node.inputs[0], given)
        if node.op == "take":
            return self.value(node.inputs[0], given)[0]
        if node.op in ("branch", "select_n"):
            condition, *cases = node.inputs
            try:
                index = self.value(condition, given)
            except Unknown:
                return self.value(cases[-1], given)  # where something counts, say
            return lax.select_n(index, *(self.value(case, given) for case in cases))
        if node.op == "stack":
            return self.value(node.inputs[0], given)[None]
        if node.op == "optimization_barrier":
            return self.value(node.inputs[0], given)
        expensive = node.op in MIXING and node.kind == Kind.DATA
        if node.eqn is None or node.eqn.primitive.multiple_results or collective_axes(node) or expensive:
            raise Unknown
        values = [self.value(each, given) for each in node.inputs]
        return node.eqn.primitive.bind(*values, **node.params)

    def _kind(self, op: str, inputs: Sequence[int], aval: Any) -> Kind:
        inexact = hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)
        if op in ("input", "carry") and not (op == "carry" and self.nodes[inputs[0]].kind == Kind.PARAM):
            return Kind.DATA if inexact else Kind.MASK
        if op == "leaf":
            return Kind.PARAM
        kinds = [self.nodes[given].kind for given in inputs]
        kind = max(kinds, default=Kind.CONSTANT)
        if op.startswith("random") or (kind == Kind.DATA and not inexact):
            return Kind.MASK
        if kind == Kind.MASK and op in MIXING and inexact and Kind.PARAM in kinds:
            return Kind.DATA  # of an embedding
        return kind


def trace(
    function: Callable[..., Any], variables: PyTree, x: PyTree, axes: Sequence[tuple[Hashable, int]] = ()
) -> tuple[Graph, Any]:
    """Traces a function `(variables, x) -> (outputs, updates)` under mapped axes; returns what it made, too."""
    closed, made = jax.make_jaxpr(function, axis_env=list(axes), return_shape=True)(variables, x)
    graph, count = Graph(), len(jax.tree.leaves(variables))
    avals = [var.aval for var in closed.jaxpr.invars]
    graph.leaves = [graph.add("leaf", (), aval) for aval in avals[:count]]
    graph.inputs = [graph.add("input", (), aval) for aval in avals[count:]]
    results = _Writer(graph).write(closed, [*graph.leaves, *graph.inputs])
    outputs = len(jax.tree.leaves(made[0]))
    graph.outputs, graph.updates = results[:outputs], results[outputs:]
    return graph, made


class _Writer:
    """Writes jaxprs out into a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def write(self, jaxpr: Any, arguments: Sequence[int]) -> list[int]:
        """Adds what a jaxpr, closed or not, makes of its arguments; returns its results."""
        jaxpr, constants = (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())
        numbers = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, value in zip(jaxpr.constvars, constants, strict=True):
            numbers[var] = self.graph.constant(value, var.aval)

        def read(atom: Any) -> int:
            is_literal = isinstance(atom, core.Literal)
            return self.graph.constant(atom.val, atom.aval) if is_literal else numbers[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            numbers |= zip(eqn.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[int]) -> Iterable[int]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(params, inputs)
        if name == "while":
            return self._while(params, inputs)
        if name == "cond":
            ends = [self.write(branch, inputs[1:]) for branch in params["branches"]]
            return [self._add("branch", (inputs[0], *each)) for each in zip(*ends, strict=True)]
        if (body := _body(eqn)) is not None:
            if name == "shard_map":
                inputs = [
                    self.graph.add("shard", (number,), var.aval, {"spec": spec})
                    for number, var, spec in zip(inputs, body.invars, params["in_specs"], strict=True)
                ]
            return self.write(body, inputs)
        apart = name in ONE_BY_ONE and len(inputs) == len(eqn.outvars)
        each = [[number] for number in inputs] if apart else [inputs] * len(eqn.outvars)
        return [
            self.graph.add(name, given, var.aval, params, eqn) for given, var in zip(each, eqn.outvars, strict=True)
        ]

    def _scan(self, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
        """Adds the body once: what it carries is unknown, or the variable that it starts from."""
        consts, carries = params["num_consts"], params["num_carry"]
        carried = [self._add("carry", (number,)) for number in inputs[consts : consts + carries]]
        body = params["jaxpr"]
        sliced = zip(inputs[consts + carries :], body.jaxpr.invars[consts + carries :], strict=True)
        taken = [self.graph.add("take", (number,), var.aval) for number, var in sliced]
        results = self.write(body, [*inputs[:consts], *carried, *taken])
        avals = [_stacked(self.graph.nodes[number].aval, params["length"]) for number in results[carries:]]
        stacked = [
            self.graph.add("stack", (number,), aval) for number, aval in zip(results[carries:], avals, strict=True)
        ]
        return [*results[:carries], *stacked]

    def _while(self, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
        first, consts = params["cond_nconsts"], params["body_nconsts"]
        carried = [self._add("carry", (number,)) for number in inputs[first + consts :]]
        return self.write(params["body_jaxpr"], [*inputs[first : first + consts], *carried])

    def _add(self, op: str, inputs: Sequence[int]) -> int:
        """Adds a value of the type of the last of its inputs."""
        return self.graph.add(op, inputs, self.graph.nodes[inputs[-1]].aval)


def collective_axes(node: Node) -> tuple[Hashable, ...]:
    """Returns the mapped axes that an operation communicates over."""
    if node.op in ("pvary", "pcast", "axis_index", "broadcast_in_dim"):
        return ()
    names = node.params.get("axis_name", node.params.get("axes", ()))
    names = names if isinstance(names, (tuple, list)) else (names,)
    return tuple(name for name in names if not isinstance(name, int))


def _body(eqn: Any) -> Any:
    """Returns the jaxpr of an equation that does what it says, whatever else it is for: jit, remat, derivatives."""
    bodies = [param for param in eqn.params.values() if isinstance(param, (core.Jaxpr, core.ClosedJaxpr))]
    if len(bodies) != 1 or eqn.primitive.name.startswith(("reduce", "scatter", "pallas", "select_and")):
        return None
    body = getattr(bodies[0], "jaxpr", bodies[0])
    fits = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return bodies[0] if fits else None


def _stacked(aval: Any, length: int) -> Any:
    return jax.ShapeDtypeStruct((length, *aval.shape), aval.dtype)
