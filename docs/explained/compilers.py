"""What each compiler makes of batch norm and layer norm: kernels that read or write an array."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import matplotlib.pyplot as plt
import passes

from explained.style import OURS, THEIRS, WIDTH

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
TARGETS = {
    "cpu": "CPU: each sum reads x as it is stored",
    "h100": "GPU (H100): no branch, and sums in a row in one kernel",
    "v5e": "TPU (v5e): a branch that is not taken is free",
}
READ, WRITTEN = OURS, THEIRS
GAP = 0.06  # between kernels
LONGEST = 13.5


def programs(target: str) -> list[dict[str, Any]]:
    """Returns the rows of `python benchmarks/passes.py TARGET`."""
    return json.loads((RESULTS / f"passes-{target}.json").read_text())["rows"]


def compilers() -> plt.Figure:
    """Draws for each compiler, layer and library the bytes that each kernel reads and writes."""
    figure, axes = plt.subplots(
        len(TARGETS), 1, figsize=(WIDTH, 7.6), sharex=True, layout="constrained"
    )
    for axis, (target, wants) in zip(axes, TARGETS.items(), strict=True):
        draw_programs(axis, programs(target))
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


def draw_programs(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    """Draws a line of boxes for each program, from the top, and names them."""
    lines = {}
    for i, row in enumerate(rows):
        first = i * (len(passes.PEERS) + 0.5)
        for at, peer in enumerate(passes.PEERS, 1):
            found = row["peers"][peer]
            lines[first + at] = peer
            end = draw_kernels(axis, first + at, 0, passes.passes(found["steps"], row["x_bytes"]))
            branch = passes.passes(found["steps_in_branches"], row["x_bytes"])
            draw_kernels(axis, first + at, end, branch, alpha=0.3)
        layer = f"{row['case']['layer']} norm"
        axis.text(LONGEST, first + 2, layer, ha="right", va="center", weight="bold")
    axis.set_yticks(list(lines), list(lines.values()))


def draw_kernels(
    axis: plt.Axes, at: int, start: float, kernels: list[tuple[float, float]], alpha: float = 1
) -> float:
    """Draws kernels one after the other, each as what it reads and what it writes."""
    for read, written in kernels:
        axis.barh(at, read, left=start, color=READ, alpha=alpha)
        axis.barh(at, written, left=start + read, color=WRITTEN, alpha=alpha)
        start += read + written + GAP
    return start
