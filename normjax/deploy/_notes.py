"""Notes about statistics that have other names than `mean` and `var`."""

from __future__ import annotations

from collections.abc import Iterator

from normjax._trees import Path
from normjax.deploy._constants import ROOTS
from normjax.deploy._graph import Graph


def notes(graph: Graph) -> Iterator[str]:
    """Returns a note for each kind of name other than `mean` and `var`."""
    names = {(norm.mean[-1], norm.var[-1]) for norm in graph.norms} - {("mean", "var")}
    for mean, var in sorted(names):
        yield f"Leaves {mean} and {var} were taken for the mean and var of batch norms."
    unknown = sorted("/".join(path) for path in _like_variances(graph))
    if unknown:
        yield (
            f"Not looked at: {', '.join(unknown)} scales as a variance does, but has another name. "
            "A batch norm is known by leaves `mean` and `var`, side by side: rename them."
        )
    elif not graph.norms:
        yield "No batch norm was found: it has leaves `mean` and `var`, side by side."


def _like_variances(graph: Graph) -> set[Path]:
    """Returns leaves outside of known batch norms whose square roots scale a value."""
    known = {path for norm in graph.norms for path in (norm.mean, norm.var)}
    rooted: set[Path] = set()
    scaling: set[Path] = set()
    for op in graph.program.ops:
        sources = graph.constants.sources.get(op.outputs[0], frozenset())
        if op.name in ROOTS and graph.constants.unknown(op.outputs[0]) is None:
            rooted |= sources if len(sources) == 1 else set()
        if graph.is_step(op) and op.name in ("mul", "div"):
            scaling |= graph.sources(op)
    return (rooted & scaling) - known
