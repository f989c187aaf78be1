"""The arithmetic of the tables: medians over seeds, steps to an accuracy, ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import NamedTuple


def steps_to(accuracy: float, steps: Sequence[int], accuracies: Sequence[float]) -> float:
    """Returns the steps until the first evaluation at or above `accuracy`, or infinity."""
    reached = (step for step, value in zip(steps, accuracies, strict=True) if value >= accuracy)
    return next(reached, math.inf)


def in_words(steps: float) -> str:
    """Returns a number of steps for a table."""
    return f"{steps:,.0f}" if math.isfinite(steps) else "not reached"


class Run(NamedTuple):
    """One variant with one seed: its accuracy after each of `steps`, and the seconds it took."""

    seed: int
    steps: list[int]
    accuracies: list[float]
    seconds: float

    @property
    def best(self) -> float:
        """The best accuracy."""
        return max(self.accuracies)

    def steps_to(self, accuracy: float) -> float:
        """Returns the steps until the first evaluation at or above `accuracy`, or infinity."""
        return steps_to(accuracy, self.steps, self.accuracies)


class Result(NamedTuple):
    """A finished variant: what it was trained with, and a run for each seed."""

    name: str
    learning_rate: float
    runs: Sequence[Run]

    @property
    def best(self) -> float:
        """The median over the seeds of the best accuracy."""
        return median(run.best for run in self.runs)

    @property
    def seconds(self) -> float:
        """The median over the seeds of the seconds."""
        return median(run.seconds for run in self.runs)

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """The steps, and the median over the seeds of the accuracy after them."""
        accuracies = zip(*(run.accuracies for run in self.runs), strict=True)
        return self.runs[0].steps, [median(values) for values in accuracies]


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


# Ioffe & Szegedy 2015, figure 3: steps to the baseline's 72.2% on ImageNet, as a ratio, and best
# accuracy.
PAPER = {
    "Baseline": "1.0x 72.2%",
    "BN-Baseline": "2.3x 72.7%",
    "BN-x5": "14.8x 73.0%",
    "BN-x30": "11.5x 74.8%",
    "BN-x5-Sigmoid": "- 69.8%",
}


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
        rows.append(
            Row(result.name, result.learning_rate, steps, ratio, result.best, result.seconds)
        )
    return Table(title, baseline.best, trained, rows, reported)


def best_of_sweep(results: Sequence[Result]) -> Result:
    """Returns the result with the best accuracy, then the fewest steps to it."""
    return min(results, key=lambda result: (-result.best, _median_steps(result, result)))


def _median_steps(result: Result, baseline: Result) -> float:
    targets = {run.seed: run.best for run in baseline.runs}
    return median(run.steps_to(targets[run.seed]) for run in result.runs)
