"""What each layer averages over."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from explained.style import OURS, WIDTH

SIZES = {"examples": 4, "positions": 5, "channels": 6}


def averaged_over() -> plt.Figure:
    """Draws which elements of a batch share a mean and a variance, for each layer."""
    example, position, channel = np.indices(tuple(SIZES.values()))
    shared = {
        "batch norm": channel == 3,
        "layer norm, RMS norm": (example == 1) & (position == 2),
        "group norm": (example == 1) & (channel >= 3),
        "instance norm": (example == 1) & (channel == 3),
    }
    figure = plt.figure(figsize=(WIDTH, 5.4), layout="constrained")
    for i, (name, filled) in enumerate(shared.items()):
        axis = figure.add_subplot(2, 2, i + 1, projection="3d")
        axis.voxels(filled, facecolors=OURS, edgecolor="white", linewidth=0.5)
        axis.set(title=name, xlim=(0, 4), ylim=(0, 5), zlim=(0, 6))
        axis.set(**{f"{axis_name}label": of for axis_name, of in zip("xyz", SIZES, strict=True)})
        axis.set(xticklabels=[], yticklabels=[], zticklabels=[])
        axis.xaxis.labelpad = axis.yaxis.labelpad = axis.zaxis.labelpad = -10
        axis.set_box_aspect(tuple(SIZES.values()), zoom=0.9)
        axis.view_init(22, -55)
    return figure
