"""Output of experiments: tables on the terminal, JSON and a plot in files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import rich.box
from matplotlib.axes import Axes
from rich.table import Table as RichTable

from common.tables import Result, Row, Table, in_words

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def rich_table(table: Table) -> RichTable:
    """Returns the table for a terminal."""
    shown = RichTable(
        title=table.title,
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("variant", no_wrap=True)
    target = f"steps to {table.target:.1%}" if table.trained else "steps"
    for heading in ("learning rate", target, "ratio", "best accuracy", "seconds"):
        shown.add_column(heading, justify="right")
    if table.reported:
        shown.add_column("the paper's", justify="right", no_wrap=True)
    if not table.trained:
        shown.caption = (
            f"'did not train': the baseline's best accuracy, {table.target:.1%}, is less than "
            "twice chance.\n"
            "Steps to it, and ratios, would mean nothing."
        )
    for row in table.rows:
        reported = [table.reported.get(row.variant, "-")] if table.reported else []
        shown.add_row(*_cells(table, row), *reported)
    return shown


def _cells(table: Table, row: Row) -> tuple[str, ...]:
    steps = in_words(row.steps)
    ratio = "-" if row.ratio is None else f"{row.ratio:.1f}x"
    if not table.trained:
        # Steps to an accuracy that guessing reaches say nothing either.
        steps, ratio = "-", "did not train"
    return (
        row.variant,
        f"{row.learning_rate:.3g}",
        steps,
        ratio,
        f"{row.best:.1%}",
        f"{row.seconds:.1f}",
    )


def result_content(result: Result) -> dict[str, Any]:
    """Returns a variant as JSON has it."""
    runs = [run._asdict() for run in result.runs]
    return {"variant": result.name, "learning_rate": result.learning_rate, "seeds": runs}


def table_content(table: Table) -> dict[str, Any]:
    """Returns a table for JSON, which has no infinity: null for steps that were not reached."""
    rows = [
        row._asdict() | {"steps": row.steps if math.isfinite(row.steps) else None}
        for row in table.rows
    ]
    return {
        "title": table.title,
        "baseline_best_accuracy": table.target,
        "baseline_trained": table.trained,
        "rows": rows,
        "reported": dict(table.reported),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file completely or not at all; NaN, as of a run that diverged, becomes null."""
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(text + "\n")
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _without_nan(value: Any) -> Any:
    """Returns the value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_curves(axes: Axes, results: Sequence[Result]) -> None:
    """Draws accuracy against steps, a line for each result; dashed at the first one's best."""
    for result in results:
        steps, accuracies = result.curve
        axes.plot(
            steps,
            [100 * value for value in accuracies],
            label=f"{result.name} ({result.learning_rate:.3g})",
        )
    best = 100 * results[0].best
    axes.axhline(
        best, color="C0", linestyle="--", linewidth=1, label=f"the baseline's best: {best:.1f}%"
    )
    axes.set(xscale="log", xlabel="training steps", ylabel="test accuracy (%)", ylim=(0, 103))
    axes.set_title("variants (learning rate)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


DASHES = ("-", "--", "-.", ":")  # so that colours are not the only difference
Curve = tuple[Sequence[int], Sequence[float]]


def write_panels(
    path: Path,
    title: str,
    ylabel: str,
    panels: Mapping[str, Mapping[str, Curve]],
    caption: str,
    xscale: Literal["linear", "log"] = "linear",
) -> None:
    """Draws curves of accuracy against steps, a panel for each group, and a caption.

    Curves of the same name look the same in all panels; panels with new names have a legend.
    """
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(
        rows,
        2,
        figsize=(9, 1.5 + 3 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    styles = {
        name: {"color": f"C{i}", "linestyle": DASHES[i % len(DASHES)]}
        for i, name in enumerate(names)
    }
    for axes, (heading, curves) in zip(grid.flat, panels.items(), strict=False):
        for name, (steps, values) in curves.items():
            axes.plot(
                steps, [100 * value for value in values], **styles[name], linewidth=1.4, label=name
            )
        _dress(axes, heading, xscale)
        first = next(iter(panels.values()))
        if curves is first or not curves.keys() <= first.keys():
            axes.legend(loc="lower right" if curves is first else "best", fontsize="small")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    figure.supylabel(ylabel, fontsize="medium")
    figure.supxlabel(f"training steps\n\n{textwrap.fill(caption, 115)}", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@contextlib.contextmanager
def figure(
    path: Path,
    title: str,
    caption: str,
    shape: tuple[int, int] = (1, 2),
    size: tuple[float, float] | None = None,
) -> Iterator[np.ndarray]:
    """Context with a grid of axes of the given shape, which writes the picture at its end.

    Args:
      path: the file of the picture.
      title: the title above all panels.
      caption: the text below them: what to see.
      shape: rows and columns of panels.
      size: inches, width and height; by default 4.5 by 3.2 a panel.
    """
    rows, columns = shape
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=size or (4.5 * columns, 1 + 3.2 * rows),
        squeeze=False,
        layout="constrained",
    )
    try:
        yield grid
        figure.suptitle(title)
        figure.supxlabel(textwrap.fill(caption, int(13 * figure.get_figwidth())), fontsize="small")
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _dress(axes: Axes, heading: str, xscale: Literal["linear", "log"]) -> None:
    axes.set(xscale=xscale, title=heading)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.label_outer()
