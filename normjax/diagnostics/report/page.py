"""Writes a report as one self-contained page: the findings, and then a picture of every layer.

The page is written by hand, since `rich.console.Console.export_html` only exports the text of the
terminal: it has none of the histograms, links from findings to layers, folded lists and colors for
dark screens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from normjax.diagnostics.findings import Finding, grouped
from normjax.diagnostics.report._text import span, summary

if TYPE_CHECKING:
    from normjax.diagnostics.report import LayerReport, Report

BINS, WIDTH, HEIGHT = 24, 168, 34
SHOWN = 6  # how many findings of a kind are shown; a click shows the others
FLOOR = 1e-8  # smaller values are drawn as 0

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1c1f23; --soft: #6b7280;
  --line: #e4e5e7; --bar: #5b84b1; --error: #c62f2f; --warning: #b97708; --note: #2f7f9e;
  --none: #3d8b55; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1d2024; --ink: #e6e7e9;
  --soft: #9aa1ab; --line: #32363c; --bar: #7ba3cf; --error: #ff7b72; --warning: #e3a93c;
  --note: #6fc0dd; --none: #69b981; } }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 2rem 0 .6rem }
.soft, small { color: var(--soft) }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere }
.error { --tone: var(--error) } .warning { --tone: var(--warning) } .note { --tone: var(--note) }
.none { --tone: var(--none) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  border-left: 4px solid var(--tone); padding: .7rem 1rem; margin: .6rem 0 }
summary { cursor: pointer; color: var(--soft) }
section b, td.mark { color: var(--tone) } section ul { margin: .3rem 0; padding-left: 1.1rem }
section p { margin: .3rem 0 0; font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; background: var(--card) }
th { text-align: left; font-weight: 600; font-size: .82rem; color: var(--soft);
  vertical-align: bottom }
th, td { padding: .35rem .7rem .35rem .4rem; border-bottom: 1px solid var(--line);
  white-space: nowrap }
td { vertical-align: middle; font-variant-numeric: tabular-nums }
td.path { white-space: normal; min-width: 9rem }
td.mark { font-size: 1.1rem; padding-right: 0 }
a { color: inherit } tr:target { background: var(--line) }
svg { display: block } rect.bar { fill: var(--bar) } rect.out { fill: var(--error) }
line { stroke: var(--line) } svg text { fill: var(--soft); font-size: 9px }
"""


def page(report: Report, title: str) -> str:
    """Returns the page as HTML.

    Args:
      report: what to show.
      title: what the report is about, such as the name of a checkpoint.
    """
    worst = next((finding.severity for finding in report.findings), "none")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Normalization of {escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>Normalization of {escape(title)}</h1>
<p class="{worst}"><b style="color: var(--tone)">
{escape(summary(report.layers, report.findings))}</b></p>
{"".join(_findings(report))}
<h2>Layers</h2>
<p class="soft">Histograms count channels. Each column has one logarithmic axis, to compare layers.
Channels at 0, or below {FLOOR:g}, are red.</p>
<div class="wide">{_table(report)}</div>
</body></html>
"""


def _findings(report: Report) -> list[str]:
    sections = []
    for group in grouped(report.findings):
        items = [_item(finding) for finding in group]
        shown, folded, more = "".join(items[:SHOWN]), "".join(items[SHOWN:]), ""
        if folded:
            label = f"<summary>{len(items) - SHOWN} more</summary>"
            more = f"<details>{label}<ul>{folded}</ul></details>"
        first = group[0]
        sections.append(
            f'<section class="{first.severity}"><b>{first.severity}: {first.rule}</b>'
            f"<ul>{shown}</ul>{more}<p>{escape(first.advice)}</p></section>\n"
        )
    return sections


def _item(finding: Finding) -> str:
    path = escape(finding.path)
    link = f'<a href="#{path}"><code>{path}</code></a>'
    return f"<li>{link}: {escape(finding.message)}</li>"


def _table(report: Report) -> str:
    axes = {name: _axis(report, name) for name in ("var", "scale")}
    drawn = {name: axis for name, axis in axes.items() if axis}
    with_gap = any(layer.gap is not None for layer in report.layers)
    heads = ["", "layer", "features", "mean"]
    heads += [f"{name}{_ticks(axis)}" for name, axis in drawn.items()]
    if with_gap:
        heads.append("gap<br><small>deviations</small>")
    head = "".join(f"<th>{text}</th>" for text in heads)
    rows = "".join(_row(layer, drawn, with_gap) for layer in report.layers)
    return f"<table><thead><tr>{head}</tr></thead>\n{rows}</table>"


def _row(layer: LayerReport, axes: Mapping[str, tuple[float, float]], with_gap: bool) -> str:
    path, severity = escape(layer.path), layer.severity or "none"
    cells = [
        f'<td class="mark" title="{severity}">●</td>',
        f'<td class="path"><code>{path}</code><br><small>{escape(layer.kind)}</small></td>',
        f"<td>{'×'.join(map(str, layer.shape)) or '1'}</td>",
        f"<td>{span(layer.mean)}</td>",
    ]
    cells += [f"<td>{_histogram(layer, name, axis)}</td>" for name, axis in axes.items()]
    if with_gap:
        cells.append(f"<td>{'' if layer.gap is None else f'{layer.gap:.2g}'}</td>")
    return f'<tr class="{severity}" id="{path}">{"".join(cells)}</tr>\n'


def _sizes(layer: LayerReport, name: str) -> np.ndarray:
    values = np.abs(layer.leaves.get(name, np.zeros(0)))
    return values[np.isfinite(values)].ravel()


def _axis(report: Report, name: str) -> tuple[float, float] | None:
    """Returns the ends of the axis, in powers of ten; None if no layer has such a leaf."""
    values = np.concatenate([_sizes(layer, name) for layer in report.layers])
    if not values.size:
        return None
    powers = np.log10(np.clip(values, FLOOR, None))
    low = math.floor(powers.min())
    return low, max(math.ceil(powers.max()), low + 1)


def _ticks(axis: tuple[float, float]) -> str:
    low, high = axis
    marks = {low: "start", high: "end"}
    if low < 0 < high:
        marks[0.0] = "middle"
    texts = ""
    for mark, anchor in sorted(marks.items()):
        x = (mark - low) / (high - low) * WIDTH
        texts += f'<text x="{x:.1f}" y="9" text-anchor="{anchor}">{10.0**mark:g}</text>'
    return f'<svg width="{WIDTH}" height="11" aria-hidden="true">{texts}</svg>'


def _histogram(layer: LayerReport, name: str, axis: tuple[float, float]) -> str:
    """Returns a histogram of a layer's channels by the size of a leaf, and its range."""
    values = _sizes(layer, name)
    if not values.size:
        return ""
    counts, _ = np.histogram(np.log10(np.clip(values, FLOOR, None)), BINS, axis)
    zeros = int((values < FLOOR).sum())
    text = f"{name}: {span(getattr(layer, name))}"
    if zeros:
        text += f", {zeros} of {values.size} at 0"
    ground = f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>'
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT + 1}" role="img" aria-label="{text}">'
        f"<title>{text}</title>{ground}{_bars(counts, zeros > 0)}</svg>"
        f"<small>{span(getattr(layer, name))}</small>"
    )


def _bars(counts: np.ndarray, first_is_red: bool) -> str:
    step, bars = WIDTH / BINS, ""
    for i, count in enumerate(counts):
        if count:
            height = max(2.0, (HEIGHT - 2) * count / counts.max())
            kind = "out" if i == 0 and first_is_red else "bar"
            bars += (
                f'<rect class="{kind}" x="{i * step:.1f}" y="{HEIGHT - height:.1f}" '
                f'width="{step - 1:.1f}" height="{height:.1f}"/>'
            )
    return bars
