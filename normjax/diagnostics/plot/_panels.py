"""Provides the axes to draw on, the caller's or a new figure's, and checks histories."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normjax import _checks


def panels(function: str, axes: Any, count: int, columns: int = 4) -> tuple[Figure, list[Axes]]:
    """Returns a figure and `count` axes; raises an error if the caller's axes are not as many."""
    if axes is None:
        rows, columns = -(-count // columns), min(count, columns)
        figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for unused in grid[count:]:
            unused.set_visible(False)
        return figure, grid[:count]
    given = list(np.asarray(axes, object).flat)
    if len(given) != count or not all(isinstance(one, Axes) for one in given):
        _checks.raise_error(
            f"plot.{function}",
            "axes are not one for each panel",
            expected=f"{count} matplotlib Axes",
            got=f"{len(given)} of type {type(given[0]).__name__}" if given else "none",
            fix="Pass figure.subplots(...), or None for a new figure",
        )
    return given[0].get_figure(root=True), given


def panel(axes: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Returns the axes and their figure; None makes a new figure of this size in inches."""
    if axes is None:
        axes = Figure(figsize=size, layout="constrained").add_subplot()
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure, axes


def raise_single(function: str, got: str, fix: str) -> NoReturn:
    """Raises an error for a history of a single step."""
    _checks.raise_error(
        f"plot.{function}",
        "there are no steps to draw over",
        expected="one leading axis of steps",
        got=got,
        fix=fix,
    )


def steps_of(function: str, steps: Any, count: int) -> np.ndarray:
    """Returns the steps to draw over, from 0 if None; raises an error if their number is wrong."""
    found = np.arange(count) if steps is None else np.asarray(steps)
    if found.shape != (count,):
        _checks.raise_error(
            f"plot.{function}",
            "steps do not fit the history",
            expected=f"{count} steps",
            got=f"steps of shape {found.shape}",
            fix="Pass the steps at which it was recorded",
        )
    return found
