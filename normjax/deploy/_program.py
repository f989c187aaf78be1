"""A traced function as a flat list of operations on numbered values, to be looked at, changed and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend import core

Path = tuple[str, ...]
ARITHMETIC = {
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "rsqrt",
    "broadcast_in_dim",
    "convert_element_type",
}
GROUPING = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat")


class Op(NamedTuple):
    """An operation.

    Attributes:
      name: of the primitive.
      params: of the primitive.
      inputs: numbers of the values that it reads.
      outputs: numbers of the values that it makes.
      run: from the values of `inputs` to those of `outputs`.
      keep: whether it does more than to make values, such as to print.
    """

    name: str
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    run: Callable[..., Iterable[Any]]
    keep: bool = False


class Program(NamedTuple):
    """What a function `(variables, *inputs)` does.

    Attributes:
      leaves: the values that are leaves of the variables, by their path.
      inputs: the values that are leaves of the inputs.
      constants: the values that are known.
      types: shape and dtype of each value.
      ops: in the order in which they run.
      outputs: the values that are returned.
      structure: the tree that they are leaves of.
    """

    leaves: dict[Path, int]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    types: list[Any]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    structure: Any


def trace(function: Callable[..., Any], variables: Any, inputs: tuple[Any, ...]) -> Program:
    """Traces a function; calls that only group operations are written out."""
    jaxpr, made = jax.make_jaxpr(function, return_shape=True)(variables, *inputs)
    paths = [path_of(path) for path, _ in jax.tree.leaves_with_path(variables)]
    writer = _Writer()
    arguments = [writer.value(var.aval) for var in jaxpr.jaxpr.invars]
    outputs = writer.write(jaxpr, arguments)
    return Program(
        dict(zip(paths, arguments, strict=False)),
        tuple(arguments[len(paths) :]),
        writer.constants,
        writer.types,
        tuple(writer.ops),
        tuple(outputs),
        jax.tree.structure(made),
    )


def path_of(keys: tuple[Any, ...]) -> Path:
    """Returns a path as the keys of nested dicts, without the boxes (`.value`) that Flax puts leaves in."""
    if len(keys) > 1 and getattr(keys[-1], "name", None) == "value":
        keys = keys[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


class _Writer:
    """Writes jaxprs out, with numbers of their own for each time that one is called."""

    def __init__(self) -> None:
        self.constants: dict[int, Any] = {}
        self.types: list[Any] = []
        self.ops: list[Op] = []

    def value(self, aval: Any) -> int:
        self.types.append(aval)
        return len(self.types) - 1

    def constant(self, value: Any, aval: Any) -> int:
        number = self.value(aval)
        self.constants[number] = value
        return number

    def write(self, closed: core.ClosedJaxpr, arguments: list[int]) -> list[int]:
        jaxpr = closed.jaxpr
        numbers = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
            numbers[var] = self.constant(value, var.aval)

        def read(atom: Any) -> int:
            return (
                self.constant(atom.val, atom.aval)
                if isinstance(atom, core.Literal)
                else numbers[atom]
            )

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if (inner := _grouped(eqn)) is not None:
                outputs = self.write(inner, inputs)
            else:
                outputs = [self.value(var.aval) for var in eqn.outvars]
                keep = bool(eqn.effects)
                run = partial(_bind, eqn)
                self.ops.append(
                    Op(eqn.primitive.name, eqn.params, tuple(inputs), tuple(outputs), run, keep)
                )
            numbers |= zip(eqn.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]


def _grouped(eqn: Any) -> core.ClosedJaxpr | None:
    """Returns the body of an equation that does nothing but what the body does."""
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.primitive.name in GROUPING:
        return body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
    # A derivative of its own says nothing of what is computed. Activations stay whole, to be called
    # by their names.
    if (
        eqn.primitive.name == "custom_jvp_call"
        and {inner.primitive.name for inner in body.jaxpr.eqns} <= ARITHMETIC
    ):
        return body
    return None


def _bind(eqn: Any, *values: Any) -> Iterable[Any]:
    with eqn.ctx.manager:
        made = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return made if eqn.primitive.multiple_results else (made,)


def users(program: Program) -> dict[int, list[Op | None]]:
    """Returns the operations that read each value, once for each time that they do; None where it is returned."""
    found: dict[int, list[Op | None]] = {number: [] for number in range(len(program.types))}
    for op in program.ops:
        for number in op.inputs:
            found[number].append(op)
    for number in program.outputs:
        found[number].append(None)
    return found


def makers(program: Program) -> dict[int, Op]:
    """Returns the operation that makes each value."""
    return {number: op for op in program.ops for number in op.outputs}


def pruned(program: Program) -> Program:
    """Returns the program without the operations, and without the leaves, that its outputs do not need."""
    needed, ops = set(program.outputs), []
    for op in reversed(program.ops):
        if op.keep or needed & set(op.outputs):
            needed |= set(op.inputs)
            ops.append(op)
    leaves = {path: number for path, number in program.leaves.items() if number in needed}
    return program._replace(ops=tuple(reversed(ops)), leaves=leaves)


def execute(program: Program, leaves: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Any:
    """Runs the program on the leaves that it needs and on inputs of the shapes it was traced with."""
    values = dict(program.constants)
    values |= {number: leaves[path] for path, number in program.leaves.items()}
    values |= zip(program.inputs, jax.tree.leaves(inputs), strict=True)
    for op in program.ops:
        values |= zip(op.outputs, op.run(*(values[number] for number in op.inputs)), strict=True)
    return jax.tree.unflatten(program.structure, [values[number] for number in program.outputs])
