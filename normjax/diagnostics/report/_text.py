"""Writes a report as text: plain, or in color with rich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from normjax.diagnostics.findings import Finding, counted, grouped, lines_of
from normjax.diagnostics.report._layer_report import LayerReport, Range

HEADINGS = ("", "layer", "kind", "features", "mean", "var", "scale", "gap")
MARKS = {"error": "x", "warning": "!", "note": "-", None: ""}
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan", None: ""}


def plain(layers: Sequence[LayerReport], findings: Sequence[Finding]) -> str:
    """Returns the table, the findings and a summary."""
    rows = [HEADINGS, *[(MARKS[layer.severity], *cells(layer)) for layer in layers]]
    if not any(row[-1] for row in rows[1:]):  # without gaps
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    said = [line for group in grouped(findings) for line in lines_of(group)]
    return "\n".join([*table, "", *said, summary(layers, findings)])


def colored(layers: Sequence[LayerReport], findings: Sequence[Finding]) -> Any:
    """Returns the same as `plain` in color, for a terminal, as an object that rich prints."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    with_gap = any(layer.gap is not None for layer in layers)
    headings = HEADINGS if with_gap else HEADINGS[:-1]
    for heading in headings:
        table.add_column(heading, overflow="fold" if heading else "ellipsis")
    for layer in layers:
        row = (MARKS[layer.severity], *cells(layer))[: len(headings)]
        table.add_row(*map(Text, row), style=COLORS[layer.severity])
    said = [Text()]
    for group in grouped(findings):
        first, *others = lines_of(group)
        said += [Text(first, style=COLORS[group[0].severity]), *map(Text, others)]
    return Group(table, *said, Text(summary(layers, findings), style="bold"))


def cells(layer: LayerReport) -> tuple[str, ...]:
    """Returns a layer's row of the table, without the mark of its severity."""
    features = "x".join(map(str, layer.shape)) or "1"
    mean, var, scale = map(span, (layer.mean, layer.var, layer.scale))
    gap = "" if layer.gap is None else f"{layer.gap:.2g}"
    return layer.path, layer.kind, features, mean, var, scale, gap


def span(found: Range | None) -> str:
    """Returns the ends of a range, as "0.5 to 1.5"; an empty string without a range."""
    if found is None:
        return ""
    if math.isnan(found.median):
        return "NaN"
    low, high = f"{found.low:.3g}", f"{found.high:.3g}"
    return low if low == high else f"{low} to {high}"


def summary(layers: Sequence[LayerReport], findings: Sequence[Finding]) -> str:
    """Returns a line with the numbers of layers and of findings of each severity."""
    count = f"{len(layers)} normalization layer{'s' * (len(layers) > 1)}"
    return f"{count}: {counted(findings) or 'nothing wrong'}"
