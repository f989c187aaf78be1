#!/usr/bin/env python3
"""Plots a result of benchmarks/layers.py or gpu.py: peers' times as bars, and the memory floor.

    python benchmarks/plot.py benchmarks/results/layers-cpu.json docs/pages/images/layers-cpu.svg
    python benchmarks/plot.py benchmarks/results/gpu-static-h100.json \
        docs/pages/images/gpu-static.svg --peers normjax flax.linen formula

Each mode and dtype has a panel, and each row a group of bars, in multiples of the row's memory
floor (the dashed line). Bars longer than --limit are cut off and labelled with their length.

For a result of gpu_static.py, the left panel shows the bytes that move, in units of x, and the
right panel the estimated time, as a multiple of flax.linen's. Branches of conditionals are drawn
pale.
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
    parser.add_argument("--limit", type=float, default=12, help="of the floor, or of Flax's time")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="default: all in the file")
    options = parser.parse_args()
    results = records.read(options.results)
    drawn = draw_programs if "target" in results else draw
    rows = [row for row in results["rows"] if "floor_ms" in row or "x_bytes" in row]
    if not rows:
        parser.error(
            f"{options.results} has no rows of layers: those of layers.py, gpu.py and gpu_static.py"
        )
    names = list(
        dict.fromkeys(name for row in rows for name in row["peers"] if measured(row, name))
    )
    names = [name for name in names if name in (options.peers or names)]
    plt.rcParams["svg.hashsalt"] = "normjax"  # makes the picture reproducible
    drawn(rows, names, options.limit, title(results)).savefig(
        options.picture, metadata={"Date": None} if svg(options) else {}
    )
    print(f"Written to {options.picture}")


def svg(options: argparse.Namespace) -> bool:
    """Returns whether the picture is an SVG, which would contain the date."""
    return options.picture.suffix == ".svg"


def title(results: dict[str, Any]) -> str:
    """Returns a title with the machine or target, and the version of JAX."""
    if "target" in results:
        return f"programs for {results['target']}, not run; jax {results['versions']['jax']}"
    machine = results["machine"]
    device = machine["processor"] if machine["backend"] == "cpu" else machine["device"]
    cores = f", {machine['cores']} cores" if machine["backend"] == "cpu" else ""
    return f"{device}{cores}, jax {results['versions']['jax']}"


def measured(row: dict[str, Any], name: str) -> bool:
    """Returns whether a row has figures of a peer."""
    return bool({"ms", "bytes_moved"} & row["peers"].get(name, {}).keys())


def draw_programs(rows: list[dict[str, Any]], names: list[str], limit: float, heading: str) -> Any:
    """Returns the plot of programs that are not run."""
    size = (14, 1.5 + 0.07 * (len(names) + 2) * len(rows))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    titles = ("bytes moved, in units of x", "estimated time, as a multiple of flax.linen's")
    keys = (("bytes_moved", "bytes_in_branches"), ("estimated_us", "estimated_us_in_branches"))
    units = (
        [row["x_bytes"] for row in rows],
        [row["peers"].get("flax.linen", {}).get("estimated_us") for row in rows],
    )
    for axis, heading_of_panel, (key, extra), each in zip(axes, titles, keys, units, strict=True):
        panel_of_programs(axis, rows, names, (key, extra), each, limit)
        axis.set_title(heading_of_panel, loc="left", fontsize=9)
    axes[0].set_yticks([at + 0.3 for at in range(len(rows))], [row["name"] for row in rows])
    axes[0].tick_params(axis="y", labelsize=7)
    axes[0].set_ylim(len(rows), -0.5)
    axes[1].axvline(1, color="black", linestyle="--", linewidth=0.8)
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=7, ncols=6, loc="outside upper right"
    )
    figure.suptitle(heading, fontsize=10)
    return figure


def panel_of_programs(
    axis: Any,
    rows: list[dict[str, Any]],
    names: list[str],
    keys: tuple[str, str],
    units: list[float | None],
    limit: float,
) -> None:
    """Draws the bars of one figure of the programs, including branches."""
    step = 1 / (len(names) + 1)
    for i, name in enumerate(names):
        found = [
            (at + i * step, *(row["peers"][name][key] / unit for key in keys))
            for at, (row, unit) in enumerate(zip(rows, units, strict=True))
            if unit and measured(row, name)
        ]
        where, lengths, extra = zip(*found, strict=True) if found else ((), (), ())
        shown = [min(length, limit) for length in lengths]
        axis.barh(where, shown, step, color=f"C{i}", label=name)
        room = [min(more, limit - length) for more, length in zip(extra, shown, strict=True)]
        axis.barh(where, room, step, left=shown, color=f"C{i}", alpha=0.3)
        for at, length in zip(where, lengths, strict=True):
            if length > limit:
                axis.text(limit, at, f" {length:.0f}", va="center", ha="left", fontsize=5)


def draw(rows: list[dict[str, Any]], names: list[str], limit: float, heading: str) -> Any:
    """Returns the plot of times."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["case"]["mode"], row["case"]["dtype"]), []).append(row)
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
