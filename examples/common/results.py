"""Accuracies over the steps of training, and what is read off them: medians, steps to a goal."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple


def steps_to(accuracy: float, steps: Sequence[int], accuracies: Sequence[float]) -> float:
    """Returns the steps until the first evaluation at or above `accuracy`, or infinity."""
    reached = (step for step, value in zip(steps, accuracies, strict=True) if value >= accuracy)
    return next(reached, math.inf)


def in_words(steps: float) -> str:
    """Returns a number of steps for a table."""
    return f"{steps:,.0f}" if math.isfinite(steps) else "not reached"


def medians(curves: Sequence[Sequence[float]]) -> list[float]:
    """Returns the curve of the medians of several curves."""
    return [median(values) for values in zip(*curves, strict=True)]


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
        return self.runs[0].steps, medians([run.accuracies for run in self.runs])

    def content(self) -> dict[str, Any]:
        """Returns the variant as JSON has it."""
        runs = [run._asdict() for run in self.runs]
        return {"variant": self.name, "learning_rate": self.learning_rate, "seeds": runs}
