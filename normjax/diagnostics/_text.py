"""A report as text: a plain table, and one of rich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from normjax.diagnostics._findings import Finding, counted, grouped, lines_of
from normjax.diagnostics._reported import LayerReport, Range

HEADINGS = ("", "layer", "kind", "features", "mean", "var", "scale", "gap")
MARKS = {"error": "x", "warning": "!", "note": "-", None: ""}
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan", None: ""}


def plain(layers: Sequence[LayerReport], findings: Sequence[Finding]) -> str:
    """Returns the table, the findings below it, and a line that sums up."""
    rows = [HEADINGS, *[(MARKS[layer.severity], *cells(layer)) for layer in layers]]
    kept = [
        i
        for i, heading in enumerate(HEADINGS)
        if heading != "gap" or any(row[i] for row in rows[1:])
    ]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    table = [
        "  ".join(row[i].ljust(width) for i, width in zip(kept, widths, strict=True)).rstrip()
        for row in rows
    ]
    said = [line for group in grouped(findings) for line in lines_of(group)]
    return "\n".join([*table, "", *said, summary(layers, findings)])


def colored(layers: Sequence[LayerReport], findings: Sequence[Finding]) -> Any:
    """Returns the same for a terminal, by rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = [(layer.severity, cells(layer)) for layer in layers]
    kept = [
        i
        for i, heading in enumerate(HEADINGS[1:])
        if heading != "gap" or any(row[i] for _, row in rows)
    ]
    table.add_column("")
    for i in kept:
        table.add_column(HEADINGS[1:][i], overflow="fold")
    for severity, row in rows:
        table.add_row(Text(MARKS[severity]), *(Text(row[i]) for i in kept), style=COLORS[severity])
    said = [Text()]
    for group in grouped(findings):
        first, *others = lines_of(group)
        said += [Text(first, style=COLORS[group[0].severity]), *map(Text, others)]
    return Group(table, *said, Text(summary(layers, findings), style="bold"))


def cells(layer: LayerReport) -> tuple[str, ...]:
    """Returns the layer's row of the table, without the mark."""
    features = "x".join(map(str, layer.shape)) or "1"
    ranges = map(span, (layer.mean, layer.var, layer.scale))
    return (
        layer.path,
        layer.kind,
        features,
        *ranges,
        "" if layer.gap is None else f"{layer.gap:.2g}",
    )


def span(found: Range | None) -> str:
    """Returns the ends of a range."""
    if found is None:
        return ""
    if math.isnan(found.median):
        return "NaN"
    low, high = f"{found.low:.3g}", f"{found.high:.3g}"
    return low if low == high else f"{low} to {high}"


def summary(layers: Sequence[LayerReport], findings: Sequence[Finding]) -> str:
    """Returns how many layers there are, and findings of each severity."""
    count = f"{len(layers)} normalization layer{'s' * (len(layers) > 1)}"
    return f"{count}: {counted(findings) or 'nothing wrong'}"
