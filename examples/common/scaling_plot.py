"""The plot of `scale_invariance.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from common import report

Runs = Mapping[str, Mapping[str, Any]]
COLORS = {"batch": "C0", "layer": "C1", "weight norm": "C2", "none": "C7"}
MARKERS = {"batch": "o", "layer": "s", "weight norm": "^", "none": "x"}
GREYS = ("darkgrey", "dimgrey")
LEAST = 0.02  # the smallest angle by the predicted one that is drawn


def draw(path: Path, title: str, caption: str, named: Callable[[str], Runs]) -> None:
    """Draws what is finished, as `named` returns it by the beginning of its names."""
    with report.figure(path, title, caption, (2, 3), (13, 8)) as grid:
        _growth(grid[0, 0], grid[0, 1], named("growth/"))
        _scaled(grid[0, 2], named("scaled/"))
        _pairs(grid[1, 0], grid[1, 1], named("rotation/batch/"))
        _predicted(grid[1, 2], named("rotation/"))


def _growth(norms: Axes, rates: Axes, runs: Runs) -> None:
    for kind, found in runs.items():
        norms.plot([0, *found["steps"]], found["norm"], color=COLORS[kind], label=kind)
        dots = "C7" if kind == "none" else "black"
        norms.plot(
            [0, *found["steps"]], found["explained"], color=dots, linestyle=":", linewidth=1.2
        )
        if kind != "none":
            rates.plot(
                [0, *found["steps"]],
                found["effective_learning_rate"],
                color=COLORS[kind],
                label=kind,
            )
    _dress(norms, "without decay, kernels grow ...", "norm, by that at the start", log=False)
    _dress(rates, "... so their learning rate falls", "effective learning rate lr / norm²")


def _scaled(axes: Axes, runs: Runs) -> None:
    for i, (c, found) in enumerate(runs.items()):
        label = f"c = {c}: lr {found['rate']:.3g}, wd {found['decay']:.3g}"
        axes.plot(
            found["steps"], found["loss"], color=f"C{i}", linewidth=(7, 3.5, 1.2)[i], label=label
        )
    _dress(axes, "kernels times c, lr c², wd / c²: the same", "training loss")


def _pairs(angles: Axes, losses: Axes, runs: Runs) -> None:
    products = [found["rate"] * found["decay"] for found in runs.values()]
    for i, (found, product) in enumerate(zip(runs.values(), products, strict=True)):
        label = f"lr {found['rate']:.3g}, wd {found['decay']:.3g}"
        if math.isclose(product, products[0]):
            color, width = f"C{i}", 1.5
        else:
            color, width, label = (
                GREYS[i % len(GREYS)],
                1.0,
                f"{label} ({product / products[0]:.0f}x)",
            )
        for axes, name in ((angles, "angle"), (losses, "loss")):
            axes.plot(
                found["steps"],
                found[name],
                color=color,
                linewidth=width,
                label=label,
                zorder=1 + width,
            )
    for product in products:
        angles.axhline(math.sqrt(2 * product), color="black", linestyle="--", linewidth=0.8)
    _dress(
        angles, "one product lr wd: one angle (batch norm) ...", "angular update (radians a step)"
    )
    _dress(losses, "... and one loss", "training loss")


def _predicted(axes: Axes, runs: Runs) -> None:
    drawn: set[str] = set()
    predicted: set[float] = set()
    for name, found in runs.items():
        kind = name.split("/")[0]
        for kernel in found["kernels"].values():
            if not math.isfinite(kernel["observed"]):
                continue  # a run that diverged
            height = max(kernel["observed"], LEAST * kernel["predicted"])
            label = "_" * (kind in drawn) + kind  # one entry for each in the legend
            axes.scatter(
                kernel["predicted"],
                height,
                marker=MARKERS[kind],
                color=COLORS[kind],
                s=28,
                label=label,
            )
            drawn.add(kind)
            predicted.add(round(kernel["predicted"], 3))
    if predicted:
        ends = min(predicted) / 1.2, max(predicted) * 1.2
        axes.plot(ends, ends, color="black", linestyle="--", linewidth=0.8)
    _dress(axes, "all normalizations turn as predicted", "observed angle (radians a step)")
    axes.set(xscale="log", xlabel="predicted angle sqrt(2 lr wd)")
    axes.set_xticks(sorted(predicted), [f"{angle:g}" for angle in sorted(predicted)])
    axes.set_xticks([], minor=True)


def _dress(axes: Axes, title: str, ylabel: str, log: bool = True) -> None:
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
