"""Queries on a program for the search for folds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp

from normjax._jaxpr import Op, Program
from normjax._trees import Path
from normjax.deploy._constants import Constants
from normjax.deploy._layout import LAYOUT, PASSING, Affine, Unfoldable
from normjax.deploy._program import users

LINEAR = ("conv_general_dilated", "dot_general")
ARITHMETIC = ("add", "sub", "mul", "div", "neg")


class Linear(NamedTuple):
    """A convolution or matrix product with one leaf.

    Attributes:
      op: the operation.
      side: the index of the operand that is the kernel.
      path: the path of the leaf.
      operand: the kernel in the layout that the operation reads.
      view: the operations from the leaf to the operand.
      features: the axes of the operand that are output features.
      axes: the axes of the output with these features.
    """

    op: Op
    side: int
    path: Path
    operand: int
    view: list[Op]
    features: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def data(self) -> int:
        """Returns the operand that is not the kernel."""
        return self.op.inputs[1 - self.side]

    @property
    def output(self) -> int:
        """Returns the output of the operation."""
        return self.op.outputs[0]


class Norm(tuple[str, ...]):
    """The path of a batch norm, and the names of its leaves."""

    mean: Path
    var: Path

    def __new__(cls, path: Path, mean: str = "mean", var: str = "var") -> Norm:
        """Creates the path of a batch norm from the names of its leaves."""
        norm = super().__new__(cls, path)
        norm.mean, norm.var = (*path, mean), (*path, var)
        return norm


class Graph:
    """A program and the known values of its leaves."""

    def __init__(self, program: Program, norms: list[Norm], leaves: Mapping[Path, Any]):
        self.program, self.norms, self.leaves = program, norms, leaves
        self.constants = Constants(program)
        self.makers, self.users = self.constants.makers, users(program)

    def shape(self, number: int) -> tuple[Any, ...]:
        """Returns the shape of a value, whose sizes may be symbolic."""
        return self.program.types[number].shape

    def dtype(self, number: int) -> Any:
        """Returns the dtype of a value."""
        return self.program.types[number].dtype

    def data(self, op: Op) -> list[int]:
        """Returns the operands that depend on the inputs."""
        return [number for number in op.inputs if number not in self.constants]

    def constant(self, op: Op) -> int | None:
        """Returns the operand of an arithmetic step that does not depend on the inputs."""
        return next((number for number in op.inputs if number in self.constants), None)

    def sources(self, op: Op) -> frozenset[Path]:
        """Returns the leaves that an arithmetic step reads."""
        constant = self.constant(op)
        return frozenset() if constant is None else self.constants.sources[constant]

    def norms_of(self, op: Op) -> list[Norm]:
        """Returns the batch norms whose variances an arithmetic step reads."""
        return [norm for norm in self.norms if norm.var in self.sources(op)]

    def is_step(self, op: Op | None) -> bool:
        """Returns whether an operation scales or shifts one value by constants."""
        if op is None or op.name not in ARITHMETIC or len(self.data(op)) != 1:
            return False
        return jnp.issubdtype(self.dtype(op.outputs[0]), jnp.inexact)

    def passes(self, op: Op | None) -> bool:
        """Returns whether an operation only changes the layout or dtype of one value."""
        return op is not None and op.name in (*LAYOUT, *PASSING) and len(self.data(op)) == 1

    def step(self, op: Op) -> np.ndarray | None:
        """Returns the constant of an arithmetic step as a compact array; None for `neg`."""
        constant = self.constant(op)
        if constant is None:
            return None
        (data,) = self.data(op)
        if op.name == "div" and op.inputs[1] == data:
            raise Unfoldable("is `div` by what the layer makes")
        if (unknown := self.constants.unknown(constant)) is not None:
            raise Unfoldable(f"is a constant made by {unknown}")
        if missing := self.constants.sources[constant] - self.leaves.keys():
            raise Unfoldable(f"is {_names(missing)}, whose value is unknown")
        rank = len(self.shape(op.outputs[0]))
        if len(self.shape(data)) != rank:
            raise Unfoldable(f"is {name_of(op)} of {self.text(op)}, which changes the shape")
        value = self.constants.value(constant, self.leaves)
        return value.reshape((1,) * (rank - value.ndim) + value.shape)

    def padding(self, op: Op) -> float:
        """Returns the padding value of a `pad`; raises `Unfoldable` if it is computed."""
        number = op.inputs[1]
        sources = self.constants.sources.get(number)
        if sources is None or sources or self.constants.unknown(number) is not None:
            raise Unfoldable("it is followed by `pad` with a value that is computed")
        given = self.program.constants.get(number)
        return float(self.constants.value(number, {}) if given is None else given)

    def is_folded(self, op: Op) -> bool:
        """Returns whether a step can become part of a kernel.

        A factor that is not computed from leaves may be computed from sizes, such as the count of a
        mean. It stays in the program, which is traced for each shape.
        """
        return op.name in ("add", "sub", "neg") or bool(self.sources(op))

    def text(self, op: Op) -> str:
        """Describes an arithmetic step in words."""
        constant = self.constant(op)
        return "" if constant is None else self.constants.text(constant)

    def alone(self, number: int, op: Op) -> bool:
        """Returns whether only one operation uses a value, directly or through single uses."""
        while len(uses := self.users[number]) == 1 and (user := uses[0]) is not None:
            if user is op:
                return True
            number = user.outputs[0]
        return False

    def linear(self, op: Op) -> Linear:
        """Returns a convolution or product with one leaf; raises `Unfoldable` for others."""
        sides = [side for side, number in enumerate(op.inputs) if number in self.constants]
        if op.name not in LINEAR or len(sides) != 1:
            raise Unfoldable(f"its input comes from {name_of(op)}, not from a linear layer")
        (side,) = sides
        operand = op.inputs[side]
        view, sources = self.constants.view(operand), self.constants.sources[operand]
        features, axes = _features(op, side, self.program)
        if view is None or not features:
            what = "not a leaf of variables: pass it as one"
            if sources:
                what = f"computed from {_names(sources)}: pass what is computed as a leaf"
            raise Unfoldable(f"the kernel of the linear layer before it is {what}")
        (path,) = sources
        if not self.alone(self.program.leaves[path], op):
            raise Unfoldable(f"{'/'.join(path)} is used more than once: give each use its own")
        return Linear(op, side, path, operand, view, features, axes)


def before(graph: Graph, op: Op, affine: Affine) -> Affine:
    """Returns the map of a step's input that is equivalent to `affine` on its output."""
    multiplier, shift = affine
    if op.name == "neg":
        return Affine(-multiplier, shift)
    value = graph.step(op)
    if value is None:
        raise Unfoldable(f"is {name_of(op)}")
    first = op.inputs[0] in graph.constants
    if not graph.is_folded(op):
        return Affine(multiplier, shift * value if op.name == "div" else shift / value)
    match op.name:
        case "add":
            return Affine(multiplier, multiplier * value + shift)
        case "sub":
            sign = -1.0 if first else 1.0
            return Affine(sign * multiplier, shift - sign * multiplier * value)
        case "mul":
            return Affine(multiplier * value, shift)
    return Affine(multiplier / value, shift)


def after(graph: Graph, op: Op, affine: Affine) -> Affine:
    """Returns the map of a step's output, if the map of its input is `affine`."""
    multiplier, shift = affine
    if op.name == "neg":
        return Affine(-multiplier, -shift)
    value = graph.step(op)
    if value is None:
        raise Unfoldable(f"is {name_of(op)}")
    first = op.inputs[0] in graph.constants
    match op.name:
        case "add":
            return Affine(multiplier, shift + value)
        case "sub":
            sign = -1.0 if first else 1.0
            return Affine(sign * multiplier, sign * (shift - value))
    scaled = shift * value if op.name == "mul" else shift / value
    if not graph.is_folded(op):
        return Affine(multiplier, scaled)
    return Affine(multiplier * value if op.name == "mul" else multiplier / value, scaled)


def name_of(op: Op) -> str:
    """Returns the name of an operation, or of the function that it calls."""
    body = getattr(op.params.get("call_jaxpr"), "jaxpr", None)
    return f"`{body.debug_info.func_name if body else op.name}`"


def _names(paths: frozenset[Path]) -> str:
    return ", ".join(sorted(map("/".join, paths)))


def _features(op: Op, side: int, program: Program) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes of the kernel that are output features, and their axes in the output.

    Both are empty if no axis of the kernel is an output feature.
    """
    if op.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        plain = side == 1 and op.params["batch_group_count"] == 1
        return ((numbers.rhs_spec[0],), (numbers.out_spec[1],)) if plain else ((), ())
    if op.name != "dot_general":
        return (), ()
    contracted, batch = op.params["dimension_numbers"]
    ranks = [program.types[number].ndim for number in op.inputs]
    free = [[i for i in range(ranks[s]) if i not in (*contracted[s], *batch[s])] for s in (0, 1)]
    start = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    axes = (*range(len(batch[0])), *range(start, start + len(free[side])))
    return (*batch[side], *free[side]), axes
