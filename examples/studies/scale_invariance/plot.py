"""The plot of `scale_invariance.py`."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import report
from matplotlib.axes import Axes

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
        steps: list[int] = [0, *found["steps"]]
        style: dict[str, Any] = {"color": COLORS[kind], "label": kind}
        norms.plot(steps, found["norm"], **style)
        dots = "C7" if kind == "none" else "black"
        norms.plot(steps, found["explained"], ":", color=dots, linewidth=1.2)
        if kind != "none":
            rates.plot(steps, found["effective_learning_rate"], **style)
    _dress(norms, "without decay, kernels grow ...", "norm, by that at the start", "linear")
    _dress(rates, "... so their learning rate falls", "effective learning rate lr / norm²")


def _scaled(axes: Axes, runs: Runs) -> None:
    for i, (c, found) in enumerate(runs.items()):
        label = f"c = {c}: lr {found['rate']:.3g}, wd {found['decay']:.3g}"
        width = (7, 3.5, 1.2)[i]
        axes.plot(found["steps"], found["loss"], color=f"C{i}", linewidth=width, label=label)
    _dress(axes, "kernels times c, lr c², wd / c²: the same", "training loss")


def _pairs(angles: Axes, losses: Axes, runs: Runs) -> None:
    products = [found["rate"] * found["decay"] for found in runs.values()]
    for i, (found, product) in enumerate(zip(runs.values(), products, strict=True)):
        label = f"lr {found['rate']:.3g}, wd {found['decay']:.3g}"
        style = {"color": f"C{i}", "linewidth": 1.5, "zorder": 2.5}
        if not math.isclose(product, products[0]):
            label += f" ({product / products[0]:.0f}x)"
            style = {"color": GREYS[i % len(GREYS)], "linewidth": 1.0, "zorder": 2.0}
        for axes, name in ((angles, "angle"), (losses, "loss")):
            axes.plot(found["steps"], found[name], label=label, **style)
        angles.axhline(math.sqrt(2 * product), color="black", linestyle="--", linewidth=0.8)
    title = "one product lr wd: one angle (batch norm) ..."
    _dress(angles, title, "angular update (radians a step)")
    _dress(losses, "... and one loss", "training loss")


def _predicted(axes: Axes, runs: Runs) -> None:
    predicted: set[float] = set()
    for name, found in runs.items():
        kind = name.split("/")[0]
        for kernel in found["kernels"].values():
            if not math.isfinite(kernel["observed"]):
                continue  # a run that diverged
            height = max(kernel["observed"], LEAST * kernel["predicted"])
            entries = axes.get_legend_handles_labels()[1]
            label = None if kind in entries else kind
            style = {"marker": MARKERS[kind], "color": COLORS[kind], "s": 28, "label": label}
            axes.scatter(kernel["predicted"], height, **style)
            predicted.add(round(kernel["predicted"], 3))
    if predicted:
        ends = min(predicted) / 1.2, max(predicted) * 1.2
        axes.plot(ends, ends, color="black", linestyle="--", linewidth=0.8)
    _dress(axes, "all normalizations turn as predicted", "observed angle (radians a step)")
    axes.set(xscale="log", xlabel="predicted angle sqrt(2 lr wd)")
    axes.set_xticks(sorted(predicted), [f"{angle:g}" for angle in sorted(predicted)])
    axes.set_xticks([], minor=True)


def _dress(axes: Axes, title: str, ylabel: str, yscale: str = "log") -> None:
    report.dress(axes, "x-small", xlabel="step", ylabel=ylabel, yscale=yscale)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, which="both")
