#!/usr/bin/env python3
"""Plots a result of benchmarks/layers.py or gpu.py: peers' times as bars, and the memory floor.

    python benchmarks/plot.py benchmarks/results/layers-cpu.json docs/pages/images/layers-cpu.svg

Each mode and dtype has a panel, each row a group of bars, in multiples of the row's floor (the
dashed line). Bars longer than --limit are cut off and labelled with their length.
"""

from __future__ import annotations

import argparse
import pathlib
from itertools import product
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from harness import records


def main() -> None:
    """Reads a result and writes a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path, help="its ending says what kind: .svg, .png")
    parser.add_argument("--limit", type=float, default=12, help="of the floor")
    options = parser.parse_args()
    results = records.read(options.results)
    rows = [row for row in results["rows"] if "floor_ms" in row]
    if not rows:
        parser.error(
            f"{options.results} has no rows with a floor: those of layers.py and gpu.py have"
        )
    plt.rcParams["svg.hashsalt"] = "normjax"  # the same picture for the same figures
    draw(rows, options.limit, title(results)).savefig(
        options.picture, metadata={"Date": None} if svg(options) else {}
    )
    print(f"Written to {options.picture}")


def svg(options: argparse.Namespace) -> bool:
    """Whether the picture is one that would have today's date in it."""
    return options.picture.suffix == ".svg"


def title(results: dict[str, Any]) -> str:
    """Names the machine and JAX's version."""
    machine = results["machine"]
    device = machine["processor"] if machine["backend"] == "cpu" else machine["device"]
    cores = f", {machine['cores']} cores" if machine["backend"] == "cpu" else ""
    return f"{device}{cores}, jax {results['versions']['jax']}"


def draw(rows: list[dict[str, Any]], limit: float, heading: str) -> Any:
    """Returns the figure."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["case"]["mode"], row["case"]["dtype"]), []).append(row)
    names = list(
        dict.fromkeys(name for row in rows for name, got in row["peers"].items() if "ms" in got)
    )
    modes, dtypes = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    heights = [max(len(panels.get((mode, dtype), ())) for dtype in dtypes) for mode in modes]
    size = (7 * len(dtypes), 1.5 + 0.07 * (len(names) + 2) * sum(heights))
    figure, axes = plt.subplots(
        len(modes),
        len(dtypes),
        figsize=size,
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (mode, dtype) in zip(axes.flat, product(modes, dtypes), strict=True):
        panel(axis, panels.get((mode, dtype), []), names, limit)
        axis.set_title(f"{mode}, {dtype}", loc="left", fontsize=9)
    figure.supxlabel(
        "time, in multiples of the floor: bytes that must move / bandwidth of a copy", fontsize=9
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=7, ncols=5, loc="outside upper right"
    )
    figure.suptitle(heading, fontsize=10)
    return figure


def panel(axis: Any, rows: list[dict[str, Any]], names: list[str], limit: float) -> None:
    """Draws the bars of one mode and dtype."""
    step = 1 / (len(names) + 1)
    for i, name in enumerate(names):
        places = [at for at, row in enumerate(rows) if "ms" in row["peers"].get(name, {})]
        spans = [
            [rows[at]["peers"][name][key] / rows[at]["floor_ms"] for key in QUARTILES]
            for at in places
        ]
        lengths = [min(median, limit) for _, median, _ in spans]
        spread = [
            [max(m - low, 0) for low, m, _ in spans],
            [max(high - m, 0) for _, m, high in spans],
        ]
        where = [at + i * step for at in places]
        axis.barh(
            where, lengths, step, color=f"C{i}", label=name, xerr=spread, error_kw={"lw": 0.5}
        )
        for at, (_, median, _) in zip(where, spans, strict=True):
            if median > limit:
                axis.text(limit, at, f" {median:.0f}", va="center", ha="left", fontsize=5)
    axis.axvline(1, color="black", linestyle="--", linewidth=0.8)
    axis.set_xlim(0, 1.06 * limit)
    labels = [
        row["name"].replace(f" {row['case']['mode']}", "").replace(f" {row['case']['dtype']}", "")
        for row in rows
    ]
    axis.set_yticks([at + 0.5 - step for at in range(len(rows))], labels, fontsize=7)
    axis.invert_yaxis()


QUARTILES = ("ms_low", "ms", "ms_high")

if __name__ == "__main__":
    main()
