"""Inlines calls in a program that fold can change, finds who reads a value, and runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from normjax._jaxpr import Op, Program, Writer
from normjax._trees import Path

ARITHMETIC = set("add sub mul div neg rsqrt broadcast_in_dim convert_element_type".split())
GROUPING = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat")


def inline(writer: Writer, eqn: Any, inputs: list[int]) -> list[int] | None:
    """Inlines the calls that only group operations."""
    name = eqn.primitive.name
    grouped = name in GROUPING or (name == "custom_jvp_call" and not _is_activation(eqn))
    return writer.write(_body(eqn), inputs) if grouped else None


def _body(eqn: Any) -> Any:
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def _is_activation(eqn: Any) -> bool:
    """Returns whether a function with a custom derivative is an activation.

    Activations take one array, and do more than arithmetic. They stay whole, so that reasons can
    name them.
    """
    names = {inner.primitive.name for inner in _body(eqn).jaxpr.eqns}
    return len(eqn.invars) == 1 and not names <= ARITHMETIC


def users(program: Program) -> dict[int, list[Op | None]]:
    """Returns the operations that read each value, once for each read; None for each return."""
    found: dict[int, list[Op | None]] = {number: [] for number in range(len(program.types))}
    for op in program.ops:
        for number in op.inputs:
            found[number].append(op)
    for number in program.outputs:
        found[number].append(None)
    return found


def pruned(program: Program) -> Program:
    """Returns the program without the operations and leaves that its outputs do not need."""
    needed, ops = set(program.outputs), []
    for op in reversed(program.ops):
        if op.has_effects or needed & set(op.outputs):
            needed |= set(op.inputs)
            ops.append(op)
    leaves = {path: number for path, number in program.leaves.items() if number in needed}
    return program._replace(ops=tuple(reversed(ops)), leaves=leaves)


def execute(program: Program, leaves: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Any:
    """Runs the program on its leaves and on inputs of the shapes that it was traced with."""
    values = dict(program.constants)
    values |= {number: leaves[path] for path, number in program.leaves.items()}
    values |= zip(program.inputs, jax.tree.leaves(inputs), strict=True)
    for op in program.ops:
        values |= zip(op.outputs, op.run(*(values[number] for number in op.inputs)), strict=True)
    return jax.tree.unflatten(program.structure, [values[number] for number in program.outputs])
