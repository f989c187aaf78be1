"""The tables of `speedup.py`: steps to the baseline's best accuracy, as in the paper's figure 3."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from common import study
from common.results import Result, in_words
from rich.table import Table

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


def compare(
    title: str,
    baseline: Result,
    variants: Sequence[Result],
    num_classes: int,
    reported: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns the table of the baseline and the variants, as JSON has it.

    A variant's target is, seed by seed, the baseline's best accuracy; its steps are the median over
    the seeds, where a seed that does not reach the target counts as infinite, None in the table. A
    ratio is the baseline's steps by the variant's. There is none to a baseline whose best accuracy
    is less than twice chance: it did not train. `reported` has what the source says, by variant.
    """
    trained = baseline.best >= 2 / num_classes
    needed = _median_steps(baseline, baseline)
    rows = []
    for result in (baseline, *variants):
        steps = _median_steps(result, baseline)
        reached = math.isfinite(steps)
        row = {"variant": result.name, "learning_rate": result.learning_rate}
        row["steps"] = steps if reached else None
        row["ratio"] = needed / steps if trained and reached else None
        rows.append(row | {"best": result.best, "seconds": result.seconds})
    return {
        "title": title,
        "baseline_best_accuracy": baseline.best,
        "baseline_trained": trained,
        "rows": rows,
        "reported": dict(reported or {}),
    }


def shown(content: Mapping[str, Any]) -> Table:
    """Returns such a table for a terminal."""
    target, reported, rows = content["baseline_best_accuracy"], content["reported"], []
    trained = content["baseline_trained"]
    for row in content["rows"]:
        steps, ratio = "-", "did not train"
        if trained:
            steps = in_words(math.inf if row["steps"] is None else row["steps"])
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.1f}x"
        cells = [row["variant"], f"{row['learning_rate']:.3g}", steps, ratio]
        cells += [f"{row['best']:.1%}", f"{row['seconds']:.1f}"]
        cells += [reported.get(row["variant"], "-")] if reported else []
        rows.append(cells)
    steps = f"steps to {target:.1%}" if trained else "steps"
    headings = ["variant", "learning rate", steps, "ratio", "best accuracy", "seconds"]
    headings += ["the paper's"] if reported else []
    made = study.table(headings, rows, title=content["title"], collapse_padding=True)
    if not trained:
        made.caption = (
            f"'did not train': the baseline's best accuracy, {target:.1%}, is less than "
            "twice chance.\nSteps to it, and ratios, would mean nothing."
        )
    return made


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
        normalized = best_of_sweep(self.normalized)
        return {"plain": best_of_sweep(self.plain), "batch norm": normalized}

    def content(self) -> dict[str, Any]:
        """Returns the depth as JSON has it."""
        plain, normalized = (
            [result.content() for result in results] for results in (self.plain, self.normalized)
        )
        return {"layers": self.layers, "plain": plain, "normalized": normalized}


def depths_table(depths: Sequence[Depth], steps: int) -> Table:
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
