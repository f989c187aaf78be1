"""Counts kernels and bytes of a compiled GPU program, and reads XLA's time estimates.

A step is something that the host launches: a kernel, a library call (cuDNN, cuBLAS), a copy or a
collective. Its bytes and time are counted as follows:

- Each operand counts as read once, and each result as written once. A kernel may read an operand
  several times, from cache or memory, but the program's text does not show how often.
- For a fusion that only slices an operand, the elements of the slices count. Memory moves in
  sectors of 32 bytes, so a strided slice moves more.
- For a fusion that updates a part of an array in place, this part counts.
- Library calls and Pallas kernels do not show slices, so all of their operands and results count,
  but not the workspaces of cuBLAS and cuDNN. XLA does not estimate their time.
- Fusions with a matrix product or a convolution have no estimate here, since XLA's model has no
  tensor cores, and its estimate is 90 times the best possible time (7 ms for 77 GFLOP in bfloat16).
- A loop counts as many times as its trip count, or once if that is unknown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import hlo

INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(.*)$", re.MULTILINE)
# The time estimate of a fusion, and the model that made it. XLA chooses the tiles of a Triton
# fusion by "indexing-cost-model"; "sol" is the time that memory alone needs.
ESTIMATE = re.compile(r'"exec_time_us":([\d.e+\-]+)[^}]*?"name":"([^"]*)"')
TILES, LIMIT = "indexing-cost-model", "sol"

# Calls of cuBLAS and cuDNN have 32 MB and more of scratch memory as their last result.
LIBRARY, WORKSPACE = 'custom_call_target="__cu', re.compile(r", [su]8\[\d*\](\{0\})?\)$")

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
UPDATE = "dynamic-update-slice"
SLICES = {"slice", "dynamic-slice", "gather"}
PRODUCTS = {"dot", "convolution", "ragged-dot", "scaled-dot"}
VIEWS = {"bitcast", "convert", "copy", "reshape", "transpose"}  # one element for each element


class Step(NamedTuple):
    """Something that is launched: its HLO opcode, bytes, and XLA's time estimate, if any."""

    name: str
    kind: str
    read: int
    written: int
    microseconds: float | None


class Program(NamedTuple):
    """The steps of a run, and separately those in branches of conditionals."""

    steps: list[Step]
    in_branches: list[Step]
    conditionals: int


class Instruction(NamedTuple):
    """One line of a computation."""

    root: bool
    name: str
    shape: str
    kind: str
    given: str  # the text in parentheses: operands, or the number of a parameter
    rest: str

    @property
    def operands(self) -> list[str]:
        """Returns the names of the instructions that compute its operands."""
        return re.findall(r"%([\w.\-]+)", self.given)


Body = dict[str, Instruction]


def program(text: str) -> Program:
    """Parses the text of a program, `compiled.as_text()`."""
    bodies = {name: instructions(body) for name, body in hlo.computations(text).items()}
    return _program(hlo.entry(text), bodies)


def figures(compiled: Any) -> dict[str, Any]:
    """Returns the counts of a compiled program, and XLA's estimate in microseconds."""
    found = program(compiled.as_text())
    return {
        "bytes_moved": moved(found.steps),
        "bytes_in_branches": moved(found.in_branches),
        "estimated_us": estimated(found.steps),
        "estimated_us_in_branches": estimated(found.in_branches),
        "kernels": len(found.steps),
        "kernels_in_branches": len(found.in_branches),
        "kernels_without_estimate": sum(step.microseconds is None for step in found.steps),
        "conditionals": found.conditionals,
        "collectives_in_branches": sum(each.in_branch for each in hlo.collectives(compiled)),
    }


def moved(steps: Sequence[Step]) -> int:
    """Returns the bytes that steps read and write."""
    return sum(step.read + step.written for step in steps)


def estimated(steps: Sequence[Step]) -> float:
    """Returns the sum of the estimates of steps that have one, in microseconds."""
    return round(sum(step.microseconds or 0.0 for step in steps), 3)


def instructions(body: str) -> Body:
    """Returns a computation's instructions by name."""
    body = re.sub(r"/\*index=\d+\*/", "", body)
    found = [Instruction(bool(root), *others) for root, *others in INSTRUCTION.findall(body)]
    return {each.name: each for each in found}


def _program(name: str, bodies: Mapping[str, Body]) -> Program:
    """Counts a computation, including its loops, calls and conditionals."""
    steps, waiting, conditionals = [], [], 0
    for instruction in bodies[name].values():
        if instruction.kind == "conditional":
            inner = [_program(branch, bodies) for branch in hlo.branches_of(instruction.rest)]
            waiting += [step for each in inner for step in each.steps + each.in_branches]
            conditionals += 1 + sum(each.conditionals for each in inner)
        elif instruction.kind in ("while", "call"):
            trips = hlo.TRIPS.search(instruction.rest)
            times = int(trips[1]) if trips else 1
            for called in hlo.CALLED.findall(instruction.rest):
                inner = _program(called, bodies)
                steps += times * inner.steps
                waiting += times * inner.in_branches
                conditionals += times * inner.conditionals
        elif instruction.kind not in FREE and not _ends(instruction.kind):
            steps.append(_step(instruction, bodies[name], bodies))
    return Program(steps, waiting, conditionals)


def _ends(kind: str) -> bool:
    """Returns whether an instruction only waits for one that was started earlier."""
    return kind.endswith(("-done", "-update"))


def _step(instruction: Instruction, body: Body, bodies: Mapping[str, Body]) -> Step:
    """Counts an instruction's bytes."""
    name, kind, operands = instruction.name, instruction.kind, instruction.operands
    sizes = [_bytes(body[each].shape) for each in operands]
    written = _bytes(instruction.shape)
    called = hlo.CALLED.search(instruction.rest)
    if kind == "fusion" and called:
        fused = bodies[called[1]]
        sizes, written = _reads(fused, sizes), _writes(fused)
    elif kind in SLICES:
        sizes[0] = written
    elif kind == UPDATE:
        sizes[0], written = 0, sizes[1]
    elif kind == "custom-call" and LIBRARY in instruction.rest:
        written = _bytes(WORKSPACE.sub("", instruction.shape))
    elif kind.endswith("-start"):
        # Its shape also includes operands; the shape of the instruction that waits only has
        # results.
        ends = [each for each in body.values() if _ends(each.kind) and name in each.operands]
        written = sum(_bytes(each.shape) for each in ends)
    multiplies = called and _multiplies(called[1], bodies)
    microseconds = None if multiplies else _estimate(instruction.rest)
    return Step(name, kind, sum(sizes), written, microseconds)


def _multiplies(name: str, bodies: Mapping[str, Body]) -> bool:
    """Returns whether a computation, or one that it calls, has a matrix product or convolution."""
    return any(
        each.kind in PRODUCTS
        or any(_multiplies(called, bodies) for called in hlo.CALLED.findall(each.rest))
        for each in bodies[name].values()
    )


def _estimate(text: str) -> float | None:
    """Returns the microseconds of the model that XLA uses, or of the first model."""
    found = {model: float(us) for us, model in ESTIMATE.findall(text) if model != LIMIT}
    return found.get(TILES, next(iter(found.values()), None))


def _reads(fused: Body, sizes: Sequence[int]) -> list[int]:
    """Returns the bytes that a fusion reads of each operand."""
    found = list(sizes)
    for each in fused.values():
        if each.kind == "parameter":
            needed = _elements_read(each, fused) * _width(each.shape)
            found[int(each.given)] = int(min(needed, _bytes(each.shape)))
    return found


def _elements_read(array: Instruction, fused: Body) -> float:
    """Returns how many elements a fusion reads of an array by slices; infinity for all."""
    if array.root:
        return math.inf
    total = 0.0
    for user in fused.values():
        if array.name not in user.operands:
            continue
        alone = user.operands.index(array.name) == 0 and user.operands.count(array.name) == 1
        if user.kind in VIEWS:
            total += _elements_read(user, fused)
        elif alone and user.kind in SLICES:
            total += sum(count for count, _ in hlo.parts(user.shape))
        elif not (alone and _in_place(user, fused)):
            return math.inf
    return total


def _writes(fused: Body) -> int:
    """Returns the bytes that a fusion writes."""
    return sum(
        _bytes(fused[each.operands[1]].shape if _in_place(each, fused) else each.shape)
        for each in _results(fused)
    )


def _results(fused: Body) -> list[Instruction]:
    """Returns the results of a fusion, without bitcasts around them."""
    (root,) = [each for each in fused.values() if each.root]
    found = [fused[name] for name in root.operands] if root.kind == "tuple" else [root]
    return [_behind_bitcasts(each, fused) for each in found]


def _in_place(instruction: Instruction, fused: Body) -> bool:
    """Returns whether an instruction updates part of an operand that the fusion returns."""
    return (
        instruction.kind == UPDATE
        and instruction in _results(fused)
        and _behind_bitcasts(fused[instruction.operands[0]], fused).kind == "parameter"
    )


def _behind_bitcasts(instruction: Instruction, fused: Body) -> Instruction:
    while instruction.kind == "bitcast":
        instruction = fused[instruction.operands[0]]
    return instruction


def _bytes(shape: str) -> int:
    return sum(count * size for count, size in hlo.parts(shape))


def _width(shape: str) -> int:
    """Returns the bytes of an element."""
    return max(size for _, size in hlo.parts(shape))
