"""Traces functions into graphs: calls, branches and loops written out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

from normjax.diagnostics._lint.graph import Graph

# What becomes of several operands, each by itself.
ONE_BY_ONE = {"psum", "psum_invariant", "pmax", "pmin", "optimization_barrier", "pvary", "pcast"}


def trace(
    function: Callable[..., Any],
    variables: PyTree,
    x: PyTree,
    *,
    axes: Sequence[tuple[Hashable, int]] = (),
    statistics: Iterable[int] = (),
) -> tuple[Graph, Any]:
    """Traces a function `(variables, x) -> (outputs, updates)`.

    Args:
      function: to be traced.
      variables: its first argument.
      x: its second.
      axes: the mapped axes that it is traced under, and their sizes.
      statistics: which of the leaves of the variables are running statistics, by their number.

    Returns:
      The graph, and what the function returns, as shapes.
    """
    try:
        closed, made = jax.make_jaxpr(function, axis_env=list(axes), return_shape=True)(
            variables, x
        )
    except NameError as error:  # of an axis, in all likelihood
        error.add_note(
            "lint: if apply_fn is to be mapped over an axis, pass its name: lint(..., axis_name='data')"
        )
        raise
    graph, count = Graph(frozenset(statistics)), len(jax.tree.leaves(variables))
    avals = [var.aval for var in closed.jaxpr.invars]
    graph.leaves = [graph.add("leaf", (), aval) for aval in avals[:count]]
    graph.inputs = [graph.add("input", (), aval) for aval in avals[count:]]
    results = _Writer(graph).write(closed, [*graph.leaves, *graph.inputs])
    outputs = len(jax.tree.leaves(made[0]))
    graph.finish(results[:outputs], results[outputs:])
    return graph, made


class _Writer:
    """Writes jaxprs out into a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def write(self, jaxpr: Any, arguments: Sequence[int]) -> list[int]:
        """Adds what a jaxpr, closed or not, makes of its arguments; returns its results."""
        jaxpr, constants = (
            (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())
        )
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
                    for number, var, spec in zip(
                        inputs, body.invars, params["in_specs"], strict=True
                    )
                ]
            return self.write(body, inputs)
        apart = name in ONE_BY_ONE and len(inputs) == len(eqn.outvars)
        each = [[number] for number in inputs] if apart else [inputs] * len(eqn.outvars)
        return [
            self.graph.add(name, given, var.aval, params, eqn)
            for given, var in zip(each, eqn.outvars, strict=True)
        ]

    def _scan(self, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
        """Adds the body once: what it carries is unknown, or the variable that it starts from."""
        consts, carries = params["num_consts"], params["num_carry"]
        carried = [self._add("carry", (number,)) for number in inputs[consts : consts + carries]]
        body = params["jaxpr"]
        sliced = zip(inputs[consts + carries :], body.jaxpr.invars[consts + carries :], strict=True)
        taken = [self.graph.add("take", (number,), var.aval) for number, var in sliced]
        results = self.write(body, [*inputs[:consts], *carried, *taken])
        avals = [
            _stacked(self.graph.nodes[number].aval, params["length"])
            for number in results[carries:]
        ]
        stacked = [
            self.graph.add("stack", (number,), aval)
            for number, aval in zip(results[carries:], avals, strict=True)
        ]
        return [*results[:carries], *stacked]

    def _while(self, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
        first, consts = params["cond_nconsts"], params["body_nconsts"]
        carried = [self._add("carry", (number,)) for number in inputs[first + consts :]]
        return self.write(params["body_jaxpr"], [*inputs[first : first + consts], *carried])

    def _add(self, op: str, inputs: Sequence[int]) -> int:
        """Adds a value of the type of the last of its inputs."""
        return self.graph.add(op, inputs, self.graph.nodes[inputs[-1]].aval)


def _body(eqn: Any) -> Any:
    """Returns the jaxpr of an equation that does what it says, whatever else it is for: jit, remat, derivatives."""
    bodies = [
        param for param in eqn.params.values() if isinstance(param, (core.Jaxpr, core.ClosedJaxpr))
    ]
    if len(bodies) != 1 or eqn.primitive.name.startswith(
        ("reduce", "scatter", "pallas", "select_and")
    ):
        return None
    body = getattr(bodies[0], "jaxpr", bodies[0])
    fits = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return bodies[0] if fits else None


def _stacked(aval: Any, length: int) -> Any:
    return jax.ShapeDtypeStruct((length, *aval.shape), aval.dtype)
