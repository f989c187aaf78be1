"""Files that studies leave: JSON, written whole or not at all, and plots with captions."""

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
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DASHES = ("-", "--", "-.", ":")  # so that colours are not the only difference
Curve = tuple[Sequence[int], Sequence[float]]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file completely or not at all; NaN, as of a run that diverged, becomes null."""
    write(path, (json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Writes the file completely or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
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


@contextlib.contextmanager
def figure(
    path: Path,
    title: str,
    caption: str,
    shape: tuple[int, int] = (1, 2),
    size: tuple[float, float] | None = None,
    **shared: Any,
) -> Iterator[np.ndarray]:
    """Context with rows and columns of axes, which writes the picture at its end.

    The caption, what to see, stands below all panels. The size is in inches, by default 4.5 by 3.2
    a panel; `shared` are matplotlib's sharex and sharey.
    """
    rows, columns = shape
    size = size or (4.5 * columns, 1 + 3.2 * rows)
    drawn, grid = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **shared
    )
    try:
        yield grid
        drawn.suptitle(title)
        drawn.supxlabel(textwrap.fill(caption, int(13 * size[0])), fontsize="small")
        drawn.savefig(path, dpi=150)
    finally:
        plt.close(drawn)


def dress(axes: Axes, legend: str | None = "small", **settings: Any) -> None:
    """Adds a grid and, if there is anything in it, a legend; `settings` are those of `axes.set`."""
    axes.set(**settings)
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=legend)


def draw_panels(
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
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    rows, first = -(-len(panels) // 2), next(iter(panels.values()))
    size = 9, 1.5 + 3 * rows
    with figure(path, title, caption, (rows, 2), size, sharex=True, sharey=True) as grid:
        grid[0, 0].figure.supylabel(ylabel, fontsize="medium")
        for axes, (heading, curves) in zip(grid.flat, panels.items(), strict=False):
            for name, (steps, values) in curves.items():
                i = names.index(name)
                style = {"color": f"C{i}", "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.4}
                axes.plot(steps, [100 * value for value in values], label=name, **style)
            new = curves is first or not curves.keys() <= first.keys()
            dress(axes, "small" if new else None, xscale=xscale, title=heading)
            axes.set_xlabel("training steps")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("")
            axes.label_outer()
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
