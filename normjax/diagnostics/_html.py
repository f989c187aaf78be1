"""A report as one page that needs nothing else: findings on top, then a picture of every layer."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from normjax.diagnostics._findings import grouped
from normjax.diagnostics._text import span, summary

if TYPE_CHECKING:
    from normjax.diagnostics._reported import LayerReport
    from normjax.diagnostics.report import Report

BINS, WIDTH, HEIGHT = 24, 168, 34
SHOWN = 6  # findings of a kind; others are folded away
FLOOR = 1e-8  # values below it are all 0 to the eye

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1c1f23; --soft: #6b7280; --line: #e4e5e7;
  --bar: #5b84b1; --error: #c62f2f; --warning: #b97708; --note: #2f7f9e; --none: #3d8b55; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1d2024; --ink: #e6e7e9; --soft: #9aa1ab;
  --line: #32363c; --bar: #7ba3cf; --error: #ff7b72; --warning: #e3a93c; --note: #6fc0dd; --none: #69b981; } }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 2rem 0 .6rem }
.soft, small { color: var(--soft) } code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere }
.error { --tone: var(--error) } .warning { --tone: var(--warning) } .note { --tone: var(--note) }
.none { --tone: var(--none) }
section { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--tone);
  border-radius: 6px; padding: .7rem 1rem; margin: .6rem 0 }
summary { cursor: pointer; color: var(--soft) }
section b, td.mark { color: var(--tone) } section ul { margin: .3rem 0; padding-left: 1.1rem }
section p { margin: .3rem 0 0; font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; background: var(--card) }
th { text-align: left; font-weight: 600; font-size: .82rem; color: var(--soft); vertical-align: bottom }
th, td { padding: .35rem .7rem .35rem .4rem; border-bottom: 1px solid var(--line); white-space: nowrap }
td { vertical-align: middle; font-variant-numeric: tabular-nums } td.path { white-space: normal; min-width: 9rem }
td.mark { font-size: 1.1rem; padding-right: 0 } a { color: inherit } tr:target { background: var(--line) }
svg { display: block } rect.bar { fill: var(--bar) } rect.out { fill: var(--error) }
line { stroke: var(--line) } svg text { fill: var(--soft); font-size: 9px }
"""


def page(report: Report, title: str) -> str:
    """Returns the page."""
    worst = next((finding.severity for finding in report.findings), "none")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Normalization of {escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>Normalization of {escape(title)}</h1>
<p class="{worst}"><b style="color: var(--tone)">{escape(summary(report.layers, report.findings))}</b></p>
{"".join(_findings(report))}
<h2>Layers</h2>
<p class="soft">Histograms count channels. All of a column share one logarithmic axis, so that a layer out of line
shows. Red: channels at 0, or below {FLOOR:g}.</p>
<div class="wide">{_table(report)}</div>
</body></html>
"""


def _findings(report: Report) -> list[str]:
    sections = []
    for group in grouped(report.findings):
        seen = [
            f'<li><a href="#{escape(finding.path)}"><code>{escape(finding.path)}</code></a>: '
            f"{escape(finding.message)}</li>"
            for finding in group
        ]
        shown, folded = "".join(seen[:SHOWN]), "".join(seen[SHOWN:])
        more = (
            f"<details><summary>{len(seen) - SHOWN} more</summary><ul>{folded}</ul></details>"
            if folded
            else ""
        )
        first = group[0]
        sections.append(
            f'<section class="{first.severity}"><b>{first.severity}: {first.rule}</b><ul>{shown}</ul>{more}'
            f"<p>{escape(first.advice)}</p></section>\n"
        )
    return sections


def _table(report: Report) -> str:
    axes = {name: _axis(report, name) for name in ("var", "scale")}
    gap = any(layer.gap is not None for layer in report.layers)
    heads = [
        "",
        "layer",
        "features",
        "mean",
        *(f"{name}{_ticks(axis)}" for name, axis in axes.items() if axis),
    ]
    heads += ["gap<br><small>deviations</small>"] * gap
    rows = []
    for layer in report.layers:
        pictures = [_histogram(layer, name, axis) for name, axis in axes.items() if axis]
        cells = [
            f'<td class="path"><code>{escape(layer.path)}</code><br><small>{escape(layer.kind)}</small></td>',
            f"<td>{'×'.join(map(str, layer.shape)) or '1'}</td><td>{span(layer.mean)}</td>",
            *(f"<td>{picture}</td>" for picture in pictures),
            f"<td>{'' if layer.gap is None else f'{layer.gap:.2g}'}</td>" * gap,
        ]
        severity = layer.severity or "none"
        mark = f'<td class="mark" title="{severity}">●</td>'
        rows.append(
            f'<tr class="{severity}" id="{escape(layer.path)}">{mark}{"".join(cells)}</tr>\n'
        )
    return f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead>\n{''.join(rows)}</table>"


def _sizes(layer: LayerReport, name: str) -> np.ndarray:
    values = np.abs(layer.leaves.get(name, np.zeros(0)))
    return values[np.isfinite(values)].ravel()


def _axis(report: Report, name: str) -> tuple[float, float] | None:
    """Returns the ends of the axis, in powers of ten; None where no layer has such a leaf."""
    values = np.concatenate([_sizes(layer, name) for layer in report.layers])
    if not values.size:
        return None
    powers = np.log10(np.clip(values, FLOOR, None))
    low = math.floor(powers.min())
    return low, max(math.ceil(powers.max()), low + 1)


def _ticks(axis: tuple[float, float]) -> str:
    low, high = axis
    marks = [low, *([0.0] if low < 0 < high else []), high]
    texts = "".join(
        f'<text x="{(mark - low) / (high - low) * WIDTH:.1f}" y="9" '
        f'text-anchor="{"start" if mark == low else "end" if mark == high else "middle"}">{10.0**mark:g}</text>'
        for mark in marks
    )
    return f'<svg width="{WIDTH}" height="11" aria-hidden="true">{texts}</svg>'


def _histogram(layer: LayerReport, name: str, axis: tuple[float, float]) -> str:
    """Returns the channels of a layer by the size of a leaf, as a picture that says its range when pointed at."""
    values, (low, high) = _sizes(layer, name), axis
    if not values.size:
        return ""
    counts, _ = np.histogram(np.log10(np.clip(values, FLOOR, None)), BINS, (low, high))
    gone = int((values < FLOOR).sum())
    step = WIDTH / BINS
    bars = []
    for i, count in enumerate(counts):
        if count:
            height = max(2.0, (HEIGHT - 2) * count / counts.max())
            kind = "out" if i == 0 and gone else "bar"
            bars.append(
                f'<rect class="{kind}" x="{i * step:.1f}" y="{HEIGHT - height:.1f}" width="{step - 1:.1f}" '
                f'height="{height:.1f}"/>'
            )
    said = f"{name}: {span(getattr(layer, name))}{f', {gone} of {values.size} at 0' * bool(gone)}"
    ground = f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>'
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT + 1}" role="img" aria-label="{said}"><title>{said}</title>'
        f"{ground}{''.join(bars)}</svg><small>{span(getattr(layer, name))}</small>"
    )
