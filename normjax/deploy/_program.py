"""Inlines calls in a program, finds the readers of values, and runs the program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from normjax._jaxpr import Op, Program, Writer
from normjax._trees import Path

ARITHMETIC = set("add sub mul div neg rsqrt broadcast_in_dim convert_element_type".split())
GROUPING = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat")


def inline(writer: Writer, eqn: Any, inputs: list[int]) -> list[int] | None:
    """Inlines calls that only group operations."""
    name = eqn.primitive.name
    grouped = name in GROUPING or (name == "custom_jvp_call" and not _is_activation(eqn))
    return writer.write(_body(eqn), inputs) if grouped else None


def _body(eqn: Any) -> Any:
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def _is_activation(eqn: Any) -> bool:
    """Returns whether a function with a custom derivative is an activation.

    Activations have one input, and are more than arithmetic. They are not inlined, so that reasons
    can name them.
    """
    names = {inner.primitive.name for inner in _body(eqn).jaxpr.eqns}
    return len(eqn.invars) == 1 and not names <= ARITHMETIC


def users(program: Program) -> dict[int, list[Op | None]]:
    """Returns the operations that read each value, once per read; None for each return."""
    found: dict[int, list[Op | None]] = {number: [] for number in range(len(program.types))}
    for op in program.ops:
        for number in op.inputs:
            found[number].append(op)
    for number in program.outputs:
        found[number].append(None)
    return found


def pruned(program: Program) -> Program:
    """Returns the program without operations and leaves that its outputs do not need."""
    needed, ops = set(program.outputs), []
    for op in reversed(program.ops):
        if op.has_effects or needed & set(op.outputs):
            needed |= set(op.inputs)
            ops.append(op)
    leaves = {path: number for path, number in program.leaves.items() if number in needed}
    return program._replace(ops=tuple(reversed(ops)), leaves=leaves)


def execute(program: Program, leaves: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Any:
    """Runs the program on its leaves and on inputs with the traced shapes."""
    values = dict(program.constants)
    values |= {number: leaves[path] for path, number in program.leaves.items()}
    values |= zip(program.inputs, jax.tree.leaves(inputs), strict=True)
    for op in program.ops:
        values |= zip(op.outputs, op.run(*(values[number] for number in op.inputs)), strict=True)
    return jax.tree.unflatten(program.structure, [values[number] for number in program.outputs])
