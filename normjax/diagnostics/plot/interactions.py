"""Draws which examples of a batch depend on which others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from normjax.diagnostics.plot._panels import panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from normjax.diagnostics.instruments.interactions import Interactions

_DECADES = 4  # the range below the largest entry; smaller entries are left blank


def interactions(result: Interactions, axes: Axes | None = None) -> Figure:
    """Draws the matrix of `interactions` as a heat map, on a logarithmic scale of four decades.

    What to look for: a network without batch statistics has only a diagonal. Batch norm fills the
    whole matrix. Ghost batches, and devices that do not share statistics, are blocks along the
    diagonal. The title has the share off the diagonal.

    Args:
      result: the result of `interactions`.
      axes: the axes to draw on; None for a new figure.

    Returns:
      The figure; `figure.savefig("interactions.png")` saves it.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 4))
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> function = lambda x: nj.batch_norm(params, batch_stats, x, True)[0]
      >>> found = nj.diagnostics.interactions(function, x)
      >>> nj.diagnostics.plot.interactions(found).axes[0].get_title()
      'Off the diagonal: 11.8%'
    """
    figure, axes = panel(axes, (5, 4.2))
    matrix = np.asarray(result.matrix, np.float64)
    top = matrix.max() or 1.0
    bottom = top / 10**_DECADES
    visible, scale = np.ma.masked_less(matrix, bottom), LogNorm(bottom, top)
    drawn = axes.imshow(visible, norm=scale, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="input of example j", ylabel="output of example i")
    axes.set_title(f"Off the diagonal: {float(result.off_diagonal):.1%}")
    axes.set_facecolor("white")
    label = r"$\Vert \partial y_i / \partial x_j \Vert^2$"
    figure.colorbar(drawn, ax=axes, label=label, extend="min")
    return figure
