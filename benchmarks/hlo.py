"""Reads collectives, bytes and estimated cycles from the text of a compiled program."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """A collective instruction with the bytes of all of its operands."""

    kind: str
    elements: int
    bytes: int
    in_branch: bool  # in a branch of a conditional, so only sent if the branch is taken


class Cycles(NamedTuple):
    """A compiler's cycle estimates of a run, and of branches that are not taken in it."""

    taken: int
    untaken: int


def collectives(compiled: Any) -> list[Collective]:
    """Returns the collectives of a compiled JAX function."""
    bodies = computations(compiled.as_text())
    waiting = in_branches(bodies)
    return [
        Collective(
            kind, sum(n for n, _ in arrays), sum(n * size for n, size in arrays), name in waiting
        )
        for name, body in bodies.items()
        for shapes, kind in COLLECTIVE.findall(body)
        if (arrays := list(parts(shapes)))
    ]


def estimated_cycles(text: str) -> Cycles | None:
    """Sums the cycle estimates that libtpu's compiler writes into a program.

    They are in the backend_config of fusions, including convolutions, and include memory time.
    Concurrent transfers (copy-start, slice-start) and a few small instructions have no estimate. A
    loop counts as many times as its trip count, or once if that is unknown.

    The cheapest branch of each conditional counts as taken; for a guard, that is the branch that
    returns its operands. All other branches are counted separately.

    Args:
      text: the text of the compiled program, `compiled.as_text()`.

    Returns:
      The cycles; None if no instruction has an estimate, as on CPUs and GPUs.
    """
    if not ESTIMATE.search(text):
        return None
    return _cycles_of(entry(text), computations(text))


def entry(text: str) -> str:
    """Returns the name of the entry computation of a program."""
    found = re.search(r"^ENTRY %?([\w.\-]+)", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError("The program's text has no ENTRY computation.")
    return found[1]


def computations(text: str) -> dict[str, str]:
    """Returns each computation's body by name."""
    parts = re.split(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def branches(bodies: Mapping[str, str]) -> set[str]:
    """Returns the branch computations of all conditionals."""
    return {name for body in bodies.values() for name in branches_of(body)}


def in_branches(bodies: Mapping[str, str]) -> set[str]:
    """Returns the computations that only run in branches of conditionals."""
    waiting, reached = branches(bodies), set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= set(CALLED.findall(bodies[name])) - reached
    return reached


def bytes_in_branches(compiled: Any) -> int:
    """Returns the bytes that all branches of conditionals read and write."""
    bodies = computations(compiled.as_text())
    return sum(_bytes_accessed(bodies[name]) for name in branches(bodies))


def _bytes_accessed(body: str) -> int:
    """Returns the bytes of the results and operands of each instruction."""
    found = re.findall(r"%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)", body)
    sizes = {name: sum(n * size for n, size in parts(shapes)) for name, shapes, _, _ in found}
    free = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}
    return sum(
        sizes[name] + sum(sizes.get(operand, 0) for operand in _names(operands))
        for name, _, kind, operands in found
        if kind not in free
    )


def _cycles_of(name: str, bodies: Mapping[str, str]) -> Cycles:
    """Returns the cycles of a computation and of all computations that it calls."""
    taken = untaken = 0
    for line in bodies[name].splitlines():
        own = ESTIMATE.search(line)
        if own:  # the estimate of a fusion includes its instructions
            taken += int(own[1])
            continue
        trips = TRIPS.search(line)
        times = int(trips[1]) if trips else 1
        for called in CALLED.findall(line):
            found = _cycles_of(called, bodies)
            taken += times * found.taken
            untaken += times * found.untaken
        branches = sorted(_cycles_of(branch, bodies) for branch in branches_of(line))
        if branches:
            taken += branches[0].taken
            untaken += branches[0].untaken + sum(sum(branch) for branch in branches[1:])
    return Cycles(taken, untaken)


def branches_of(text: str) -> list[str]:
    """Returns the branch computations of the conditionals in a part of a program."""
    found = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)
    for names in re.findall(r"branch_computations=\{([^}]*)\}", text):
        found += _names(names)
    return found


def _names(text: str) -> list[str]:
    return re.findall(r"[\w.\-]+", text)


def parts(shapes: str) -> Iterator[tuple[int, int]]:
    """Yields, for each array, the number of elements and the bytes of an element."""
    for kind, bits, dims in SHAPE.findall(shapes):
        yield (
            math.prod(map(int, filter(None, dims.split(",")))),
            1 if kind == "pred" else max(int(bits) // 8, 1),
        )
