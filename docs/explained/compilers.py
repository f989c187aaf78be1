"""What each compiler makes of batch norm and layer norm: the kernels that read or write an array."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import matplotlib.pyplot as plt

from explained.style import OURS, THEIRS, WIDTH

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import passes

TARGETS = {
    "cpu": "CPU: each sum reads x as it is stored",
    "h100": "GPU (H100): no branch, and a row of sums in one kernel",
    "v5e": "TPU (v5e): a branch that is not taken is free",
}
READ, WRITTEN = OURS, THEIRS
GAP = 0.06  # between kernels
LONGEST = 13.5


def programs(target: str) -> list[dict[str, Any]]:
    """Returns the rows of `python benchmarks/passes.py TARGET`."""
    return json.loads((BENCHMARKS / "results" / f"passes-{target}.json").read_text())["rows"]


def compilers() -> plt.Figure:
    """Draws for each compiler, layer and library the bytes that each kernel reads and writes."""
    figure, axes = plt.subplots(
        len(TARGETS), 1, figsize=(WIDTH, 7.6), sharex=True, layout="constrained"
    )
    for axis, (target, wants) in zip(axes, TARGETS.items(), strict=True):
        names = draw_programs(axis, programs(target))
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.set_title(wants, loc="left")
    axes[-1].set(xlim=(0, LONGEST), xlabel="bytes, in units of x; a box is a kernel")
    figure.legend(handles=legend(), loc="outside upper left", ncols=3, handlelength=1)
    return figure


def legend() -> list[plt.Rectangle]:
    """Returns a box of each kind."""
    return [
        plt.Rectangle((0, 0), 1, 1, color=READ, label="read"),
        plt.Rectangle((0, 0), 1, 1, color=WRITTEN, label="written"),
        plt.Rectangle((0, 0), 1, 1, color=READ, alpha=0.3, label="read in a branch, not taken"),
    ]


def draw_programs(axis: plt.Axes, rows: list[dict[str, Any]]) -> list[str]:
    """Draws a line of boxes for each program, from the top; returns their names."""
    names = []
    for row in rows:
        layer = row["case"]["layer"]
        for peer in passes.PEERS:
            found = row["peers"][peer]
            end = draw_kernels(axis, len(names), 0, passes.passes(found["steps"], row["x_bytes"]))
            branch = passes.passes(found["steps_in_branches"], row["x_bytes"])
            draw_kernels(axis, len(names), end, branch, alpha=0.3)
            names.append(f"{layer}, {peer}")
    return names


def draw_kernels(
    axis: plt.Axes, at: int, start: float, kernels: list[tuple[float, float]], alpha: float = 1
) -> float:
    """Draws kernels one after the other, each as what it reads and what it writes."""
    for read, written in kernels:
        axis.barh(at, read, left=start, color=READ, alpha=alpha)
        axis.barh(at, written, left=start + read, color=WRITTEN, alpha=alpha)
        start += read + written + GAP
    return start
