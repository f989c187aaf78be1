"""Converts a traced function to a flat list of operations on numbered values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from normjax._trees import Path, by_path


class Op(NamedTuple):
    """An operation.

    Attributes:
      name: the name of the primitive, or of another operation that computes the outputs.
      params: the parameters of the primitive.
      inputs: the numbers of its input values.
      outputs: the numbers of its output values.
      eqn: the equation, which includes the source location; None if there is none.
    """

    name: str
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    eqn: Any = None

    @property
    def has_effects(self) -> bool:
        """Returns whether the operation has a side effect, such as printing."""
        return self.eqn is not None and bool(self.eqn.effects)

    def run(self, *values: Any) -> Iterable[Any]:
        """Returns the values of `outputs`, computed from the values of `inputs`."""
        primitive = self.eqn.primitive
        with self.eqn.ctx.manager:
            made = primitive.bind(*values, **primitive.get_bind_params(self.params))
        return made if primitive.multiple_results else (made,)


class Program(NamedTuple):
    """The operations of a function `(variables, *inputs)`.

    Attributes:
      leaves: the values that are leaves of the variables, by their path.
      inputs: the values that are leaves of the inputs.
      constants: the known values.
      types: shape and dtype of each value. Values are numbered in the order in which they are
        computed.
      ops: the operations, in the order in which they run.
      outputs: the values that are returned.
      structure: the tree structure of the outputs.
    """

    leaves: dict[Path, int]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    types: list[Any]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    structure: Any


# Inlines an equation, given the numbers of its inputs, and returns the numbers of its outputs.
# Returns None if the equation stays one operation.
Inline = Callable[["Writer", Any, list[int]], "Sequence[int] | None"]


def trace(
    function: Callable[..., Any],
    variables: Any,
    inputs: tuple[Any, ...],
    *,
    inline: Inline,
    axes: Sequence[tuple[Hashable, int]] = (),
) -> Program:
    """Traces a function of variables and inputs.

    Args:
      function: the function to trace.
      variables: its first argument.
      inputs: its other arguments.
      inline: inlines equations that should not stay one operation.
      axes: the mapped axes to trace under, and their sizes.
    """
    make = jax.make_jaxpr(function, axis_env=list(axes), return_shape=True)
    closed, made = make(variables, *inputs)
    paths = by_path(variables)
    writer = Writer(inline)
    arguments = [writer.value(var.aval) for var in closed.jaxpr.invars]
    outputs = writer.write(closed, arguments)
    return Program(
        dict(zip(paths, arguments, strict=False)),
        tuple(arguments[len(paths) :]),
        writer.constants,
        writer.types,
        tuple(writer.ops),
        tuple(outputs),
        jax.tree.structure(made),
    )


def makers(program: Program) -> dict[int, Op]:
    """Returns the operation that computes each value."""
    return {number: op for op in program.ops for number in op.outputs}


class Writer:
    """Inlines jaxprs; the values of each call get new numbers."""

    def __init__(self, inline: Inline) -> None:
        self.inline = inline
        self.constants: dict[int, Any] = {}
        self.types: list[Any] = []
        self.ops: list[Op] = []

    def value(self, aval: Any) -> int:
        """Returns a number for a value."""
        self.types.append(aval)
        return len(self.types) - 1

    def constant(self, value: Any, aval: Any) -> int:
        """Returns a number for a known value."""
        number = self.value(aval)
        self.constants[number] = value
        return number

    def add(
        self,
        name: str,
        inputs: Iterable[int],
        avals: Iterable[Any],
        params: Mapping[str, Any] = {},
        eqn: Any = None,
    ) -> tuple[int, ...]:
        """Adds an operation; returns the numbers of its outputs."""
        outputs = tuple(map(self.value, avals))
        self.ops.append(Op(name, params, tuple(inputs), outputs, eqn))
        return outputs

    def write(self, jaxpr: Any, arguments: Sequence[int]) -> list[int]:
        """Inlines a jaxpr, closed or not; returns the numbers of its results."""
        closed = jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())
        numbers = dict(zip(closed.jaxpr.invars, arguments, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            numbers[var] = self.constant(value, var.aval)

        def read(atom: Any) -> int:
            is_literal = isinstance(atom, core.Literal)
            return self.constant(atom.val, atom.aval) if is_literal else numbers[atom]

        for eqn in closed.jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            outputs = self.inline(self, eqn, inputs)
            if outputs is None:
                avals = [var.aval for var in eqn.outvars]
                outputs = self.add(eqn.primitive.name, inputs, avals, eqn.params, eqn)
            numbers |= zip(eqn.outvars, outputs, strict=True)
        return [read(atom) for atom in closed.jaxpr.outvars]
