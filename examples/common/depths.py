"""Sigmoid networks of growing depth, with and without batch norm: a part of `speedup.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import rich.box
from matplotlib.axes import Axes
from rich.table import Table

from common import report
from common.tables import Result, best_of_sweep

FACTORS = (5, 30)  # of the learning rate, as of BN-x5 and BN-x30; the better one counts
SHARE = 8  # of the budget of the other runs: an eighth
REPORTED = (
    "The paper (section 4.2.2) reports of Inception with sigmoids on ImageNet: 69.8% with BN-x5,\n"
    "never better than chance without normalization."
)
LABELS = {False: "plain", True: "batch norm"}


class Depth(NamedTuple):
    """Networks of one depth, without and with normalization, each at its learning rates."""

    layers: int
    plain: Sequence[Result]
    normalized: Sequence[Result]

    @property
    def best(self) -> dict[bool, Result]:
        """Those at the better rate, by whether they are normalized."""
        return {False: best_of_sweep(self.plain), True: best_of_sweep(self.normalized)}


def content(depths: Sequence[Depth]) -> list[dict[str, Any]]:
    """Returns the runs as JSON has them."""
    return [
        {
            "layers": depth.layers,
            "plain": [report.result_content(result) for result in depth.plain],
            "normalized": [report.result_content(result) for result in depth.normalized],
        }
        for depth in depths
    ]


def table(depths: Sequence[Depth], steps: int) -> Table:
    """Returns best accuracies, and their learning rates, for a terminal."""
    shown = Table(
        title=f"Sigmoid networks of growing depth: best accuracy within {steps:,} steps, "
        "at the better of two rates",
        title_justify="left",
        caption=REPORTED,
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("hidden layers", justify="right")
    for label in LABELS.values():
        shown.add_column(label, justify="right")
        shown.add_column("rate", justify="right")
    for depth in depths:
        cells = (
            (f"{result.best:.1%}", f"{result.learning_rate:.3g}") for result in depth.best.values()
        )
        shown.add_row(str(depth.layers), *(cell for pair in cells for cell in pair))
    return shown


def draw(axes: Axes, depths: Sequence[Depth], steps: int) -> None:
    """Draws best accuracy against depth."""
    layers = [depth.layers for depth in depths]
    for normalize, label in LABELS.items():
        accuracies = [100 * depth.best[normalize].best for depth in depths]
        axes.plot(layers, accuracies, marker="o", color=f"C{normalize:d}", label=label)
    axes.set(
        xscale="log",
        xlabel="hidden layers of sigmoids",
        ylim=(0, 103),
        title=f"best within {steps:,} steps",
    )
    axes.set_xticks(layers, map(str, layers))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
