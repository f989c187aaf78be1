"""Finds the linear operations of a program whose outputs go only to a batch norm at inference.

Nothing here depends on how a batch norm is written. A chain starts at a product or convolution with
one leaf. It continues with additions and multiplications whose other operand does not depend on the
inputs and is one number for each output feature. The whole chain is `multiplier * (W x) + shift`,
so folding it is exact. A chain that reads a leaf `var`, with a leaf `mean` beside it, contains a
batch norm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jax import numpy as jnp

from normjax._jaxpr import Op, Program
from normjax._trees import Path
from normjax.deploy._constants import Constants
from normjax.deploy._program import users

LINEAR = ("conv_general_dilated", "dot_general")
LAYOUT = ("reshape", "squeeze", "expand_dims", "transpose")
ARITHMETIC = ("add", "sub", "mul", "div", "neg")
PASSING = (*LAYOUT, "convert_element_type", "copy", "stop_gradient", "name")


class Step(NamedTuple):
    """An operation of a chain; `axes` are the feature axes of its output."""

    op: Op
    axes: tuple[int, ...]
    constant: int | None = None  # the operand that does not depend on the inputs
    reverse: bool = False  # whether the constant is the first operand


class Pair(NamedTuple):
    """A linear operation and the chain to fold into it.

    Attributes:
      kernel: the path of its kernel.
      operand: the kernel as the operation reads it.
      view: the operations that make the operand from the leaf.
      features: the axes of the operand that are features of the output.
      axes: the axes of the output that have these features.
      output: the value that the operation makes.
      sizes: the sizes of the features.
      steps: the chain, to its last arithmetic operation.
      norms: the paths of the batch norms in the chain.
      bias: the path of the bias that is added before them and used nowhere else, or None.
    """

    kernel: Path
    operand: int
    view: list[Op]
    features: tuple[int, ...]
    axes: tuple[int, ...]
    output: int
    sizes: tuple[int, ...]
    steps: tuple[Step, ...]
    norms: tuple[Path, ...]
    bias: Path | None


class Finder:
    """Finds what can be folded in a program.

    Attributes:
      pairs: the linear operations and chains that can be folded.
      constants: the values that do not depend on the inputs.
    """

    def __init__(self, program: Program, norms: list[Path]):
        self.program, self.norms, self.constants = program, norms, Constants(program)
        self.users, self.makers = users(program), self.constants.makers
        self._reasons: dict[int, str] = {}  # why nothing is folded into an operation, by its output
        linear = [op for op in program.ops if op.name in LINEAR]
        pairs = [self._look_at(op) for op in linear]
        self.pairs = [pair for pair in pairs if pair is not None]

    def reason(self, norm: Path) -> str:
        """Returns why a batch norm is in none of the pairs."""
        var = (*norm, "var")
        for op in self.program.ops:
            data = [number for number in op.inputs if number not in self.constants]
            sources = [self.constants.sources.get(number, ()) for number in op.inputs]
            if data and any(var in paths for paths in sources):
                if op.name in ARITHMETIC:
                    return self._reason(data[0])
                return f"it is used by {_name(op)}"
        return "its variance is not used"

    def _reason(self, number: int) -> str:
        """Traces the input of a batch norm back to the operation that makes it."""
        while number not in self._reasons:
            op = self.makers.get(number)
            if op is None:
                return "it comes first: its input is the model's"
            data = [given for given in op.inputs if given not in self.constants]
            if op.name not in (*PASSING, *ARITHMETIC) or len(data) != 1:
                return f"its input comes from {_name(op)}, not from a linear layer"
            (number,) = data
        return self._reasons[number]

    def _look_at(self, op: Op) -> Pair | None:
        """Returns the pair that starts with a linear operation, or None and notes the reason."""
        sides = [side for side, number in enumerate(op.inputs) if number in self.constants]
        if len(sides) != 1:
            return None
        (side,), (output,) = sides, op.outputs
        kernel = op.inputs[side]
        view, features, axes = self.constants.view(kernel), *_features(op, side, self.program)
        if view is None or not features:
            known = bool(self.constants.sources[kernel])
            what = f"computed from {self._leaves(kernel)}" if known else "not a leaf of variables"
            self._reasons[output] = f"the kernel of the linear layer before it is {what}"
            return None
        (path,) = self.constants.sources[kernel]
        steps, reason = self._chain(output, axes, "/".join(path))
        norms = self._norms_of(steps)
        if not self._alone(self.program.leaves[path], op):
            norms, reason = (), f"{'/'.join(path)} is used more than once"
        self._reasons[output] = reason
        if not norms:
            return None
        sizes = tuple(self.program.types[output].shape[axis] for axis in axes)
        bias = self._bias(steps, sizes)
        return Pair(path, kernel, view, features, axes, output, sizes, steps, norms, bias)

    def _norms_of(self, steps: tuple[Step, ...]) -> tuple[Path, ...]:
        """Returns the batch norms whose variance a chain reads, in its order."""
        found: dict[Path, None] = {}
        for step in steps:
            sources = self._sources(step)
            found |= dict.fromkeys(norm for norm in self.norms if (*norm, "var") in sources)
        return tuple(found)

    def _chain(
        self, number: int, axes: tuple[int, ...], kernel: str
    ) -> tuple[tuple[Step, ...], str]:
        """Follows a value while it is scaled and shifted.

        Returns the steps to the last arithmetic operation, and why the chain ends.
        """
        steps: list[Step] = []
        while True:
            if len(uses := self.users[number]) != 1 or (op := uses[0]) is None:
                reason = f"the output of {kernel} is also used elsewhere"
                break
            step = self._step(op, number, axes)
            if isinstance(step, str):
                reason = f"between {kernel} and it {step}"
                break
            steps.append(step)
            axes, (number,) = step.axes, op.outputs
        arithmetic = [i for i, step in enumerate(steps) if step.op.name in ARITHMETIC]
        return tuple(steps[: arithmetic[-1] + 1] if arithmetic else ()), reason

    def _step(self, op: Op, number: int, axes: tuple[int, ...]) -> Step | str:
        """Returns an operation as a step of a chain, or what is in the way."""
        if op.name not in (*PASSING, *ARITHMETIC) or not self._floating(op.outputs[0]):
            return f"is {_name(op)}"
        if op.name in LAYOUT:
            before, after = (self.program.types[i].shape for i in (number, op.outputs[0]))
            moved = _moved(op, before, after, axes)
            if moved is None:
                return f"{_name(op)} mixes the features with others"
            return Step(op, moved)
        if len(op.inputs) == 1:
            return Step(op, axes)
        reverse = op.inputs[1] == number
        constant = op.inputs[0 if reverse else 1]
        if constant not in self.constants or (reverse and op.name == "div"):
            return f"is {_name(op)}"
        if (unknown := self.constants.unknown(constant)) is not None:
            return f"is a constant made by {unknown}"
        same_shape = self.program.types[op.outputs[0]].shape == self.program.types[number].shape
        if not same_shape or not self.constants.varying(constant) <= set(axes):
            return f"is {_name(op)} of {self._leaves(constant)}, not one number for each feature"
        return Step(op, axes, constant, reverse)

    def _bias(self, steps: tuple[Step, ...], sizes: tuple[int, ...]) -> Path | None:
        """Returns the bias of the linear layer: one leaf, of the features' shape, added first."""
        first = next(step for step in steps if step.constant is not None)
        sources = self._sources(first)
        if first.op.name != "add" or len(sources) != 1:
            return None
        (path,) = sources
        number = self.program.leaves[path]
        fits = self.program.types[number].shape == sizes and path[-1] not in ("mean", "var")
        return path if fits and self._alone(number, first.op) else None

    def _alone(self, number: int, op: Op) -> bool:
        """Returns whether a value goes only to an operation, directly or through single uses."""
        while len(uses := self.users[number]) == 1 and (user := uses[0]) is not None:
            if user is op:
                return True
            number = user.outputs[0]
        return False

    def _sources(self, step: Step) -> frozenset[Path]:
        return frozenset() if step.constant is None else self.constants.sources[step.constant]

    def _leaves(self, number: int) -> str:
        return ", ".join(sorted(map("/".join, self.constants.sources[number]))) or "a constant"

    def _floating(self, number: int) -> bool:
        return jnp.issubdtype(self.program.types[number].dtype, jnp.inexact)


def _features(op: Op, side: int, program: Program) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes of the kernel that are output features, and their axes in the output.

    Both are empty if no axis of the kernel is one.
    """
    if op.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        plain = side == 1 and op.params["batch_group_count"] == 1
        return ((numbers.rhs_spec[0],), (numbers.out_spec[1],)) if plain else ((), ())
    contracted, batch = op.params["dimension_numbers"]
    ranks = [program.types[number].ndim for number in op.inputs]
    free = [[i for i in range(ranks[s]) if i not in (*contracted[s], *batch[s])] for s in (0, 1)]
    before = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    axes = (*range(len(batch[0])), *range(before, before + len(free[side])))
    return (*batch[side], *free[side]), axes


def _moved(op: Op, before: tuple, after: tuple, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the axes after an operation of `LAYOUT`, None if it merges or splits one."""
    if op.name == "transpose":
        return tuple(op.params["permutation"].index(axis) for axis in axes)
    moved = []
    for axis in axes:
        place = math.prod(before[:axis])
        same = [i for i, size in enumerate(after) if size == before[axis]]
        same = [i for i in same if math.prod(after[:i]) == place]
        moved.append(same[0] if same else None)
    return None if None in moved else tuple(moved)


def _name(op: Op) -> str:
    body = getattr(op.params.get("call_jaxpr"), "jaxpr", None)
    return f"`{body.debug_info.func_name if body else op.name}`"
