"""Draws who depends on whom in a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from normjax.diagnostics.plot._panels import panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from normjax.diagnostics.interactions import Interactions

_DECADES = 4  # below the largest entry; what is less is shown as nothing


def interactions(result: Interactions, axes: Axes | None = None) -> Figure:
    """Draws the matrix of `nj.diagnostics.interactions` as a heat map, on a logarithmic scale of four decades.

    What to see: a network without batch statistics is a diagonal on an empty ground; batch norm
      fills the ground;
    ghost batches and unsynced devices are blocks along the diagonal. The share off the diagonal is
    in the title.

    Args:
      result: what `interactions` returned.
      axes: to draw on; None for a new figure's.

    Returns:
      The figure, to be saved: `figure.savefig("interactions.png")`.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 4))
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> found = nj.diagnostics.interactions(lambda x: nj.batch_norm(params, batch_stats, x, True)[0], x)
      >>> nj.diagnostics.plot.interactions(found).axes[0].get_title()
      'Off the diagonal: 11.8%'
    """
    figure, axes = panel(axes, (5, 4.2))
    matrix = np.asarray(result.matrix, np.float64)
    top = matrix.max() or 1.0
    bottom = top / 10**_DECADES
    drawn = axes.imshow(
        np.ma.masked_less(matrix, bottom),
        norm=LogNorm(bottom, top),
        cmap="viridis",
        interpolation="nearest",
    )
    axes.set(xlabel="input of example j", ylabel="output of example i")
    axes.set_title(f"Off the diagonal: {float(result.off_diagonal):.1%}")
    axes.set_facecolor("white")
    figure.colorbar(
        drawn, ax=axes, label=r"$\Vert \partial y_i / \partial x_j \Vert^2$", extend="min"
    )
    return figure
