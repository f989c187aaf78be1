"""Reads the collectives off a compiled program's text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """What devices send each other at one point of a program: all operands of one instruction together."""

    kind: str
    elements: int
    bytes: int
    in_branch: bool  # of a conditional: sent only where that branch is taken


def collectives(compiled: Any) -> list[Collective]:
    """Returns the collectives of a compiled JAX function."""
    bodies = computations(compiled.as_text())
    waiting = in_branches(bodies)
    return [
        Collective(
            kind, sum(n for n, _ in parts), sum(n * size for n, size in parts), name in waiting
        )
        for name, body in bodies.items()
        for shapes, kind in COLLECTIVE.findall(body)
        if (parts := list(_parts(shapes)))
    ]


def computations(text: str) -> dict[str, str]:
    """Returns each computation's body by name."""
    parts = re.split(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def branches(bodies: Mapping[str, str]) -> set[str]:
    """Returns the computations that conditionals choose from."""
    found = set()
    for body in bodies.values():
        for names in re.findall(r"branch_computations=\{([^}]*)\}", body):
            found |= set(_names(names))
        found |= set(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", body))
    return found


def in_branches(bodies: Mapping[str, str]) -> set[str]:
    """Returns the computations that run in some branch of a conditional only, or are called from there."""
    waiting, reached = branches(bodies), set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= (
            set(re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)", bodies[name]))
            - reached
        )
    return reached


def bytes_in_branches(compiled: Any) -> int:
    """Returns the bytes that instructions in branches of conditionals read and write; all count as taken."""
    bodies = computations(compiled.as_text())
    return sum(_bytes_accessed(bodies[name]) for name in branches(bodies))


def _bytes_accessed(body: str) -> int:
    """The bytes of each instruction's results and operands."""
    found = re.findall(r"%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)", body)
    sizes = {name: sum(n * size for n, size in _parts(shapes)) for name, shapes, _, _ in found}
    free = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}
    return sum(
        sizes[name] + sum(sizes.get(operand, 0) for operand in _names(operands))
        for name, _, kind, operands in found
        if kind not in free
    )


def _names(text: str) -> list[str]:
    return re.findall(r"[\w.\-]+", text)


def _parts(shapes: str) -> Iterator[tuple[int, int]]:
    """Yields the number of elements of each array, and the bytes of one of them."""
    for kind, bits, dims in SHAPE.findall(shapes):
        yield (
            math.prod(map(int, filter(None, dims.split(",")))),
            1 if kind == "pred" else max(int(bits) // 8, 1),
        )
