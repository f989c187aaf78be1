"""The tables of `speedup.py`: steps to the baseline's best accuracy, as in the paper's figure 3."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import rich.table
from common import study
from common.results import Result, in_words

# Ioffe & Szegedy 2015, figure 3: steps to the baseline's 72.2% on ImageNet, as a ratio, and best
# accuracy.
PAPER = {
    "Baseline": "1.0x 72.2%",
    "BN-Baseline": "2.3x 72.7%",
    "BN-x5": "14.8x 73.0%",
    "BN-x30": "11.5x 74.8%",
    "BN-x5-Sigmoid": "- 69.8%",
}
REPORTED_OF_DEPTHS = (
    "The paper (section 4.2.2) reports of Inception with sigmoids on ImageNet: 69.8% with BN-x5,\n"
    "never better than chance without normalization."
)


class Row(NamedTuple):
    """A row of a table. `steps` is infinite if it missed the target; then `ratio` may be None."""

    variant: str
    learning_rate: float
    steps: float
    ratio: float | None
    best: float
    seconds: float


class Table(NamedTuple):
    """Variants relative to a baseline. `target` is its best accuracy, `trained` False near chance.

    `reported` has what the source says of variants, by name.
    """

    title: str
    target: float
    trained: bool
    rows: list[Row]
    reported: Mapping[str, str] = MappingProxyType({})

    def content(self) -> dict[str, Any]:
        """Returns the table for JSON, in which infinity, for steps not reached, becomes null."""
        rows = [
            row._asdict() | {"steps": row.steps if math.isfinite(row.steps) else None}
            for row in self.rows
        ]
        return {
            "title": self.title,
            "baseline_best_accuracy": self.target,
            "baseline_trained": self.trained,
            "rows": rows,
            "reported": dict(self.reported),
        }

    def shown(self) -> rich.table.Table:
        """Returns the table for a terminal."""
        target = f"steps to {self.target:.1%}" if self.trained else "steps"
        headings = ["variant", "learning rate", target, "ratio", "best accuracy", "seconds"]
        headings += ["the paper's"] if self.reported else []
        rows = []
        for row in self.rows:
            ratio = "-" if row.ratio is None else f"{row.ratio:.1f}x"
            reached = (in_words(row.steps), ratio) if self.trained else ("-", "did not train")
            measured = f"{row.best:.1%}", f"{row.seconds:.1f}"
            reported = [self.reported.get(row.variant, "-")] if self.reported else []
            rows.append((row.variant, f"{row.learning_rate:.3g}", *reached, *measured, *reported))
        made = study.table(headings, rows, title=self.title, collapse_padding=True)
        if not self.trained:
            made.caption = (
                f"'did not train': the baseline's best accuracy, {self.target:.1%}, is less than "
                "twice chance.\nSteps to it, and ratios, would mean nothing."
            )
        return made


def compare(
    title: str,
    baseline: Result,
    variants: Sequence[Result],
    num_classes: int,
    reported: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """Returns the table of the baseline and the variants.

    A variant's target is, seed by seed, the baseline's best accuracy; its steps are the median over
    the seeds, where a seed that does not reach the target counts as infinite. A ratio is the
    baseline's steps by the variant's. There is none to a baseline whose best accuracy is less than
    twice chance: it did not train.
    """
    trained = baseline.best >= 2 / num_classes
    needed = _median_steps(baseline, baseline)
    rows = []
    for result in (baseline, *variants):
        steps = _median_steps(result, baseline)
        ratio = needed / steps if trained and math.isfinite(steps) else None
        rate, best, seconds = result.learning_rate, result.best, result.seconds
        rows.append(Row(result.name, rate, steps, ratio, best, seconds))
    return Table(title, baseline.best, trained, rows, reported)


def best_of_sweep(results: Sequence[Result]) -> Result:
    """Returns the result with the best accuracy, then the fewest steps to it."""
    return min(results, key=lambda result: (-result.best, _median_steps(result, result)))


def _median_steps(result: Result, baseline: Result) -> float:
    targets = {run.seed: run.best for run in baseline.runs}
    return median(run.steps_to(targets[run.seed]) for run in result.runs)


class Depth(NamedTuple):
    """Networks of one depth, without and with normalization, each at its learning rates."""

    layers: int
    plain: Sequence[Result]
    normalized: Sequence[Result]

    @property
    def best(self) -> dict[str, Result]:
        """The results at the better rate, by the kind of network."""
        return {
            "plain": best_of_sweep(self.plain),
            "batch norm": best_of_sweep(self.normalized),
        }


def depths_table(depths: Sequence[Depth], steps: int) -> rich.table.Table:
    """Returns best accuracies, and their learning rates, for a terminal."""
    rows = []
    for depth in depths:
        plain, normalized = (
            (f"{result.best:.1%}", f"{result.learning_rate:.3g}") for result in depth.best.values()
        )
        rows.append((str(depth.layers), *plain, *normalized))
    title = f"Sigmoid networks of growing depth: best accuracy within {steps:,} steps, "
    headings = "hidden layers", "plain", "rate", "batch norm", "rate"
    made = study.table(headings, rows, 0, f"{title}at the better of two rates")
    made.caption = REPORTED_OF_DEPTHS
    return made
