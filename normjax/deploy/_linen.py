"""Converts a folded model to a linen module, for tools that work on modules, such as qwix.

Each linear layer calls `jax.lax.conv_general_dilated` or `jax.lax.dot_general` inside a module with
its kernel, as Flax's layers do. Such tools expect the calls there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from normjax._jaxpr import Op, Program
from normjax._trees import Path, flatten, nest
from normjax.deploy._graph import LINEAR
from normjax.deploy._layout import PASSING
from normjax.deploy._recipe import Recipe, program_for
from normjax.deploy._rewrite import Layer

PARAMS = "params"


def as_linen(recipe: Recipe, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns a linen module and its variables; leaves outside of collections become parameters."""
    from flax import linen

    in_collections, Scope = PARAMS in variables, _scope(linen)
    used = {path: leaf for path, leaf in flatten(variables).items() if path in recipe.used}
    leaves = {path if in_collections else (PARAMS, *path): leaf for path, leaf in used.items()}
    # Traced by `init` and `apply`, before a tool replaces functions of `lax`.
    prepared: list[Program] = []

    class FoldedModule(linen.Module):
        def init(self, rngs: Any, *inputs: Any, **options: Any) -> Any:
            return _prepared(
                inputs, lambda: super(FoldedModule, self).init(rngs, *inputs, **options)
            )

        def apply(self, variables: Any, *inputs: Any, **options: Any) -> Any:
            return _prepared(
                inputs, lambda: super(FoldedModule, self).apply(variables, *inputs, **options)
            )

        @linen.compact
        def __call__(self, *inputs: Any) -> Any:
            program = prepared[-1] if prepared else program_for(recipe, {}, inputs)
            scopes: dict[str, Any] = {}

            def read(path: Path, use: Callable) -> Any:
                whole = path if in_collections else (PARAMS, *path)
                collection, *inner = whole
                if len(inner) == 1:
                    return use(self.param(inner[0], lambda key: leaves[whole]))
                if inner[0] not in scopes:
                    scopes[inner[0]] = Scope(name=inner[0])
                return scopes[inner[0]](collection, tuple(inner[1:]), leaves[whole], use)

            return _run(program, read, inputs)

    def _prepared(inputs: Any, call: Callable[[], Any]) -> Any:
        prepared.append(program_for(recipe, {}, inputs))
        try:
            return call()
        finally:
            prepared.pop()

    return FoldedModule(), nest(leaves)


def _scope(linen: Any) -> type:
    """Returns the class of modules that are named after the path of a leaf."""

    class Scope(linen.Module):
        @linen.compact
        def __call__(self, collection: str, path: Path, value: Any, use: Callable) -> Any:
            first, *inner = path
            if inner:
                return Scope(name=first)(collection, tuple(inner), value, use)
            if collection == PARAMS:
                return use(self.param(first, lambda key: value))
            return use(self.variable(collection, first, lambda: value).value)

    return Scope


def _run(program: Program, read: Callable[[Path, Callable], Any], inputs: Any) -> Any:
    """Runs a program; `read(path, use)` calls a function of a leaf inside its module."""
    kernels = _kernels(program)
    values = dict(program.constants)
    values |= zip(program.inputs, jax.tree.leaves(inputs), strict=True)
    for path, number in program.leaves.items():
        if path not in kernels.values():
            values[number] = read(path, lambda leaf: leaf)
    for op in program.ops:
        if op.outputs in kernels:
            made = read(kernels[op.outputs], partial(_linear, op, values))
            values[op.outputs[0]] = made
        elif all(number in values for number in op.inputs):
            # The others change the layout of a kernel.
            given = (values[number] for number in op.inputs)
            values |= zip(op.outputs, op.run(*given), strict=True)
    return jax.tree.unflatten(program.structure, [values[number] for number in program.outputs])


def _kernels(program: Program) -> dict[tuple[int, ...], Path]:
    """Returns the leaves that a linear operation reads directly and that are used once."""
    leaves = {number: path for path, number in program.leaves.items()}
    makers = {number: op for op in program.ops for number in op.outputs}
    found: dict[tuple[int, ...], Path] = {}
    for op in program.ops:
        operands = [_operand(op)] if isinstance(op, Layer) else list(op.inputs)
        if not isinstance(op, Layer) and op.name not in LINEAR:
            continue
        for number in operands:
            while number in makers and makers[number].name in PASSING:
                (number,) = makers[number].inputs
            if number in leaves:
                found[op.outputs] = leaves[number]
    paths = list(found.values())
    users = [number for op in program.ops for number in op.inputs]
    return {
        outputs: path
        for outputs, path in found.items()
        if paths.count(path) == 1 and users.count(program.leaves[path]) == 1
    }


def _operand(op: Op) -> int:
    return op.inputs[1]


def _linear(op: Op, values: Mapping[int, Any], kernel: Any) -> Any:
    """Runs a linear operation on its kernel, which a tool may have replaced."""
    if isinstance(op, Layer):
        data, bias, *border = (values[number] for i, number in enumerate(op.inputs) if i != 1)
        value, plain = op.prepared(data, *border)
        return op.finished(_called(plain, value, kernel, op.params["side"]), bias)
    side = next(i for i, number in enumerate(op.inputs) if number not in values)
    return _called(op, values[op.inputs[1 - side]], kernel, side)


def _called(op: Op, value: Any, kernel: Any, side: int) -> Any:
    params = op.params
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    kernel = kernel.astype(value.dtype) if kernel.dtype != value.dtype else kernel
    if op.name == "conv_general_dilated":
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        counts = ("feature_group_count", "batch_group_count")
        others = {name: params[name] for name in (*names, *counts)}
        return lax.conv_general_dilated(value, kernel, **others, **options)
    contracted, batch = params["dimension_numbers"]
    if side == 1:
        return lax.dot_general(value, kernel, params["dimension_numbers"], **options)
    numbers = (tuple(reversed(contracted)), tuple(reversed(batch)))
    made = lax.dot_general(value, kernel, numbers, **options)
    first, free = len(batch[0]), value.ndim - len(contracted[1]) - len(batch[1])
    places = range(first, first + free)
    return jnp.moveaxis(made, tuple(places), tuple(range(made.ndim - free, made.ndim)))
