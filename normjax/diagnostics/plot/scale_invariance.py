"""Which parameters only the direction of counts, at a glance."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.axes
import numpy as np
from matplotlib.figure import Figure

from normjax.diagnostics.plot._panels import panel
from normjax.diagnostics.scale_invariance import ScaleInvariance

_LEAST = 1e-8  # where zeros are drawn


def scale_invariance(
    found: Mapping[str, ScaleInvariance], axes: matplotlib.axes.Axes | None = None
) -> Figure:
    """Draws for each parameter what its scale does, relative to a random change, on a logarithmic axis.

    What to see: parameters fall into two groups, some five orders of magnitude apart. One in
      between has a
    normalization behind it whose epsilon is no longer small. Hollow marks are parameters without
    influence.

    Args:
      found: what `scale_invariance` returned.
      axes: matplotlib axes; None for those of a new figure.

    Returns:
      The figure.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> w = {"direction": jnp.arange(1.0, 4.0), "linear": jnp.ones(3)}
      >>> f = lambda p: p["direction"] / jnp.linalg.norm(p["direction"]) + p["linear"]
      >>> figure = nj.diagnostics.plot.scale_invariance(nj.diagnostics.scale_invariance(w, f))
      >>> print([label.get_text() for label in figure.axes[0].get_yticklabels()])
      ['direction', 'linear']
    """
    figure, axes = panel(axes, (7, 1.2 + 0.28 * len(found)))
    rows = np.arange(len(found))
    marks = {
        "outputs, with the parameter scaled": ("o", [numbers.change for numbers in found.values()]),
        "gradient along the parameter": (
            "D",
            [numbers.cosine / numbers.chance for numbers in found.values()],
        ),
    }
    for i, (label, (marker, values)) in enumerate(marks.items()):
        faces = [f"C{i}" if numbers.influence > 0 else "none" for numbers in found.values()]
        height = np.maximum(values, _LEAST)
        axes.scatter(
            height, rows, marker=marker, facecolors=faces, edgecolors=f"C{i}", label=label, zorder=2
        )
    axes.set(
        xscale="log",
        xlim=(_LEAST / 2, 50),
        xlabel="relative to a random change: 0 is invariant, 1 is not",
    )
    axes.set_yticks(rows, list(found))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(
        fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False
    )
    return figure
