"""Draws the layers of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normjax.diagnostics.plot._panels import panels
from normjax.diagnostics.report import LayerReport, Report

COLORS = {"error": "#c62f2f", "warning": "#d98c0a", "note": "#2f7f9e", None: "#7d8894"}
PANELS = {
    "var": "running variance",
    "scale": "|scale|",
    "gap": "gap, training to inference\n(standard deviations)",
}
FLOOR = 1e-8  # drawn in place of 0 on logarithmic axes


def report(report: Report, axes: Sequence[Axes] | None = None) -> Figure:
    """Draws a row for each layer: a mark for each channel, in the color of the worst finding.

    The panels show the running variance, the size of scale, and the gap between training and
    inference; panels without values are left out. An unhealthy channel is far from the others in
    its row, and an unhealthy layer is far from the other rows. 0 is at the left edge.

    Args:
      report: the result of `normjax.diagnostics.report`.
      axes: matplotlib axes, one for each panel with values; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if the number of axes is not the number of panels.

    Example:
      >>> import normjax as nj
      >>> found = nj.diagnostics.report(nj.batch_norm_init(16))
      >>> figure = nj.diagnostics.plot.report(found)
      >>> print([axes.get_xlabel() for axes in figure.axes])
      ['running variance', '|scale|']
    """
    names = [name for name in PANELS if any(_values(layer, name).size for layer in report.layers)]
    if axes is None:
        figure, own = _new_figure(len(names), len(report.layers))
    else:
        figure, own = panels("report", axes, len(names))
    for name, panel in zip(names, own, strict=True):
        _panel(panel, report, name)
    _label_rows(own[0], report)
    return figure


def _new_figure(columns: int, layers: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(2.2 + 3.0 * columns, 1.2 + 0.24 * layers), layout="constrained")
    return figure, list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])


def _values(layer: LayerReport, name: str) -> np.ndarray:
    """Returns the finite values in a layer's row of a panel, with 1e-8 in place of 0."""
    if name == "gap":
        gaps = np.array([] if layer.gap is None else [layer.gap])
        return gaps[np.isfinite(gaps)]
    values = np.abs(layer.leaves.get(name, np.zeros(0))).ravel()
    return np.maximum(values[np.isfinite(values)], FLOOR)


def _panel(axes: Axes, report: Report, name: str) -> None:
    for row, layer in enumerate(report.layers):
        values = _values(layer, name)
        color = COLORS[layer.severity]
        if name == "gap":
            axes.barh(row, values.sum(), 0.6, color=color)
        elif values.size:
            axes.hlines(row, values.min(), values.max(), color=color, linewidth=1, alpha=0.5)
            axes.plot(values, np.full(values.size, row), "|", color=color, markersize=8, alpha=0.8)
            axes.plot(np.median(values), row, "o", color=color, markersize=3.5)
    if name != "gap":
        axes.set_xscale("log")
    axes.set_xlabel(PANELS[name])
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _label_rows(axes: Axes, report: Report) -> None:
    axes.set_yticks(range(len(report.layers)), [layer.path for layer in report.layers], fontsize=8)
    for label, layer in zip(axes.get_yticklabels(), report.layers, strict=True):
        label.set_color(COLORS[layer.severity] if layer.severity else "black")
    axes.set_ylim(len(report.layers) - 0.4, -0.6)
