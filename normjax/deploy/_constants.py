"""Finds what does not depend on the inputs of a program: its leaves, and its value in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax import numpy as jnp

from normjax._jaxpr import Op, Program, makers
from normjax._trees import Path
from normjax.deploy._wide import widened

FUNCTION = "fold"


def _same(params: Mapping[str, Any], value: np.ndarray) -> np.ndarray:
    return value


def _broadcast(params: Mapping[str, Any], value: np.ndarray) -> np.ndarray:
    shape, axes = params["shape"], params["broadcast_dimensions"]
    sizes = [value.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape))]
    return np.broadcast_to(value.reshape(sizes), shape)


# A batch norm whose chain needs another primitive is not folded.
VIEWS: dict[str, Callable[..., np.ndarray]] = {
    "convert_element_type": _same,
    "copy": _same,
    "reshape": lambda params, value: value.reshape(params["new_sizes"]),
    "rev": lambda params, value: np.flip(value, params["dimensions"]),
    "squeeze": lambda params, value: value.squeeze(params["dimensions"]),
    "expand_dims": lambda params, value: np.expand_dims(value, params["dimensions"]),
    "stop_gradient": _same,
    "transpose": lambda params, value: value.transpose(params["permutation"]),
}
ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda params, a, b: a + b,
    "div": lambda params, a, b: a / b,
    "exp": lambda params, value: np.exp(value),
    "integer_pow": lambda params, value: value ** params["y"],
    "max": lambda params, a, b: np.maximum(a, b),
    "mul": lambda params, a, b: a * b,
    "neg": lambda params, value: -value,
    "pow": lambda params, a, b: a**b,
    "rsqrt": lambda params, value: 1 / np.sqrt(value),
    "sqrt": lambda params, value: np.sqrt(value),
    "square": lambda params, value: value * value,
    "sub": lambda params, a, b: a - b,
}
KNOWN = VIEWS | ELEMENTWISE | {"broadcast_in_dim": _broadcast}


class Constants:
    """The values of a program that do not depend on its inputs."""

    def __init__(self, program: Program):
        self.program, self.makers = program, makers(program)
        self.sources: dict[int, frozenset[Path]] = dict.fromkeys(program.constants, frozenset())
        self.sources |= {number: frozenset([path]) for path, number in program.leaves.items()}
        for op in program.ops:
            if all(number in self.sources for number in op.inputs):
                leaves = frozenset().union(*(self.sources[number] for number in op.inputs))
                self.sources |= dict.fromkeys(op.outputs, leaves)

    def __contains__(self, number: int) -> bool:
        return number in self.sources

    def unknown(self, number: int) -> str | None:
        """Returns a primitive between the leaves and here that `value` does not know."""
        op = self.makers.get(number)
        if op is None:
            return None
        if op.name not in KNOWN or not _floating(self.program, number):
            return op.name
        return next((name for name in map(self.unknown, op.inputs) if name), None)

    def varying(self, number: int) -> set[int]:
        """Returns the axes along which a value may vary."""
        op, shape = self.makers.get(number), self.program.types[number].shape
        if op is not None and op.name == "broadcast_in_dim":
            axes = op.params["broadcast_dimensions"]
            return {axes[axis] for axis in self.varying(op.inputs[0])}
        if op is not None and op.name in ELEMENTWISE:
            return set().union(*map(self.varying, op.inputs))
        return {axis for axis, size in enumerate(shape) if size != 1}

    def value(self, number: int, leaves: Mapping[Path, Any]) -> np.ndarray:
        """Returns a value in float64; raises an error for leaves that are not finite."""
        op = self.makers.get(number)
        if op is not None:
            return KNOWN[op.name](op.params, *(self.value(given, leaves) for given in op.inputs))
        if number in self.program.constants:
            return widened(FUNCTION, "a constant", self.program.constants[number])
        (path,) = self.sources[number]
        return widened(FUNCTION, "/".join(path), leaves[path])

    def view(self, number: int) -> list[Op] | None:
        """Returns the operations that only lay out one leaf, in order; None if others occur."""
        ops: list[Op] = []
        while (op := self.makers.get(number)) is not None:
            if op.name not in VIEWS or not _floating(self.program, number):
                return None
            ops.insert(0, op)
            (number,) = op.inputs
        return ops if self.sources[number] else None


def back(view: list[Op], value: np.ndarray, program: Program) -> np.ndarray:
    """Lays a value out as the leaf that `view` starts from."""
    for op in reversed(view):
        if op.name == "transpose":
            value = value.transpose(np.argsort(op.params["permutation"]))
        elif op.name == "rev":
            value = np.flip(value, op.params["dimensions"])
        else:
            value = value.reshape(program.types[op.inputs[0]].shape)
    return value


def _floating(program: Program, number: int) -> bool:
    return jnp.issubdtype(program.types[number].dtype, jnp.inexact)
