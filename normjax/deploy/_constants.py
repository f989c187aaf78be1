"""Finds values that do not depend on a program's inputs, and computes them in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax import numpy as jnp

from normjax._jaxpr import Op, Program, makers
from normjax._trees import Path
from normjax.deploy._layout import Unfoldable, laid_back, laid_out
from normjax.deploy._wide import widened

FUNCTION = "fold"
VIEWS = (
    "convert_element_type",
    "copy",
    "reshape",
    "rev",
    "squeeze",
    "expand_dims",
    "stop_gradient",
    "transpose",
)


def _select(params: Mapping[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.where(which, cases[-1], cases[0])


# A batch norm that needs another primitive is not folded.
ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "abs": lambda params, value: np.abs(value),
    "add": lambda params, a, b: a + b,
    "div": lambda params, a, b: a / b,
    "exp": lambda params, value: np.exp(value),
    "expm1": lambda params, value: np.expm1(value),
    "ge": lambda params, a, b: a >= b,
    "gt": lambda params, a, b: a > b,
    "integer_pow": lambda params, value: value ** params["y"],
    "le": lambda params, a, b: a <= b,
    "log1p": lambda params, value: np.log1p(value),
    "lt": lambda params, a, b: a < b,
    "max": lambda params, a, b: np.maximum(a, b),
    "min": lambda params, a, b: np.minimum(a, b),
    "mul": lambda params, a, b: a * b,
    "ne": lambda params, a, b: a != b,
    "neg": lambda params, value: -value,
    "pow": lambda params, a, b: a**b,
    "rsqrt": lambda params, value: 1 / np.sqrt(value),
    "select_n": _select,
    "sqrt": lambda params, value: np.sqrt(value),
    "square": lambda params, value: value * value,
    "sub": lambda params, a, b: a - b,
}
ROOTS = ("rsqrt", "sqrt", "pow")
KNOWN = {*VIEWS, *ELEMENTWISE, "broadcast_in_dim"}


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
        """Returns a primitive between the leaves and this value that `value` does not support."""
        op = self.makers.get(number)
        if op is None:
            return None
        if op.name not in KNOWN or not _is_known_type(self.program.types[number].dtype):
            return op.name
        return next((name for name in map(self.unknown, op.inputs) if name), None)

    def value(self, number: int, leaves: Mapping[Path, Any]) -> np.ndarray:
        """Returns a value as a compact float64 array; raises an error for NaN and infinities."""
        op = self.makers.get(number)
        if op is not None:
            return self._computed(op, [self.value(given, leaves) for given in op.inputs])
        if number in self.program.constants:
            return widened(FUNCTION, "a constant", self.program.constants[number])
        (path,) = self.sources[number]
        return widened(FUNCTION, "/".join(path), leaves[path])

    def _computed(self, op: Op, values: list[np.ndarray]) -> np.ndarray:
        if op.name in ELEMENTWISE:
            return np.asarray(ELEMENTWISE[op.name](op.params, *values))
        before, after = (self.program.types[i].shape for i in (op.inputs[0], op.outputs[0]))
        (value,) = values
        if value.dtype == bool and op.name == "convert_element_type":
            value = value.astype(np.float64)
        return laid_out(op, value, before, after)

    def text(self, number: int) -> str:
        """Returns a formula of leaves and literals, without layout operations."""
        op = self.makers.get(number)
        if op is not None:
            inner = ", ".join(map(self.text, op.inputs))
            return f"{op.name}({inner})" if op.name in ELEMENTWISE else inner
        if number in self.program.constants:
            value = np.asarray(self.program.constants[number])
            return f"{value:.6g}" if value.ndim == 0 else f"an array of shape {value.shape}"
        (path,) = self.sources[number]
        return "/".join(path)

    def view(self, number: int) -> list[Op] | None:
        """Returns the layout operations of one leaf, in order; None if there are others."""
        ops: list[Op] = []
        while (op := self.makers.get(number)) is not None:
            if op.name not in VIEWS or not _is_floating(self.program, number):
                return None
            ops.insert(0, op)
            (number,) = op.inputs
        return ops if self.sources[number] else None


def forwards(view: list[Op], value: Any, program: Program) -> Any:
    """Converts a compact array of a leaf to the layout of the operand after `view`."""
    for op in view:
        before, after = (program.types[i].shape for i in (op.inputs[0], op.outputs[0]))
        value = laid_out(op, value, before, after)
    return value


def backwards(view: list[Op], value: Any, program: Program) -> Any:
    """Converts a compact array of an operand to the layout of the leaf before `view`."""
    for op in reversed(view):
        before, after = (program.types[i].shape for i in (op.inputs[0], op.outputs[0]))
        value = laid_back(op, value, before, after)
    return value


def _is_floating(program: Program, number: int) -> bool:
    return jnp.issubdtype(program.types[number].dtype, jnp.inexact)


def _is_known_type(dtype: Any) -> bool:
    return dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.inexact)


__all__ = ["ELEMENTWISE", "FUNCTION", "ROOTS", "Constants", "Unfoldable", "backwards", "forwards"]
