"""Reads collectives off a compiled program's text."""

import re

COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def computations(text: str) -> dict[str, str]:
    """Returns each computation's body by name."""
    parts = re.split(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def in_branches(bodies: dict[str, str]) -> set[str]:
    """Returns the computations that run in some branch of a conditional only."""
    waiting = set()
    for body in bodies.values():
        for names in re.findall(r"branch_computations=\{([^}]*)\}", body):
            waiting |= set(re.findall(r"[\w.\-]+", names))
        waiting |= set(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", body))
    reached = set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= set(re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)", bodies[name])) - reached
    return reached


def collectives(compiled) -> list[tuple[str, int]]:
    """Returns (kind, number of elements) of each collective outside of conditionals' branches."""
    bodies = computations(compiled.as_text())
    skipped = in_branches(bodies)
    found = []
    for name, body in bodies.items():
        if name not in skipped:
            for shape, kind in COLLECTIVE.findall(body):
                found.append((kind, sum(elements(dims) for dims in re.findall(r"\w+\[([\d,]*)\]", shape))))
    return found


def elements(dims: str) -> int:
    total = 1
    for size in filter(None, dims.split(",")):
        total *= int(size)
    return total
