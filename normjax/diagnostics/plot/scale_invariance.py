"""Draws how far the network is invariant to the scale of each parameter."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.axes
import numpy as np
from matplotlib.figure import Figure

from normjax.diagnostics.instruments.scale_invariance import ScaleInvariance
from normjax.diagnostics.plot._panels import panel

_LEAST = 1e-8  # drawn in place of 0


def scale_invariance(
    found: Mapping[str, ScaleInvariance], axes: matplotlib.axes.Axes | None = None
) -> Figure:
    """Draws the effect of each parameter's scale, relative to a random change.

    What to look for: parameters form two groups, about five orders of magnitude apart on the
    logarithmic axis. If a parameter is between them, the epsilon of the normalization after it is
    large relative to the variance. Hollow marks are parameters without influence.

    Args:
      found: the result of `scale_invariance`.
      axes: matplotlib axes; None for a new figure.

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
    changes = [numbers.change for numbers in found.values()]
    cosines = [numbers.cosine / numbers.chance for numbers in found.values()]
    marks = {
        "outputs, with the parameter scaled": ("o", changes),
        "gradient along the parameter": ("D", cosines),
    }
    for i, (label, (marker, values)) in enumerate(marks.items()):
        faces = [f"C{i}" if numbers.influence > 0 else "none" for numbers in found.values()]
        colors = {"facecolors": faces, "edgecolors": f"C{i}"}
        axes.scatter(
            np.maximum(values, _LEAST), rows, marker=marker, label=label, zorder=2, **colors
        )
    axes.set(xscale="log", xlim=(_LEAST / 2, 50))
    axes.set_xlabel("relative to a random change: 0 is invariant, 1 is not")
    axes.set_yticks(rows, list(found))
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
    axes.legend(fontsize="small", ncols=2, frameon=False, **above)
    return figure
