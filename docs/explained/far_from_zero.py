"""What batch norm makes of numbers far from zero."""

from __future__ import annotations

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

import normjax as nj
from explained.style import OURS, REST, THEIRS, WIDTH


def far_from_zero() -> plt.Figure:
    """Draws batch norm of 10,000 + noise: what comes out of Flax, and of normjax."""
    x = 1e4 + jax.random.normal(jax.random.key(0), (1024, 64))
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.2), layout="constrained")
    axes[0].hist(np.ravel(x), 60, color=REST)
    axes[0].set(title="x:\n10,000 + noise", xticks=(9996, 10004))
    layers = {"flax.linen": (nn.BatchNorm, THEIRS), "normjax": (nj.linen.BatchNorm, OURS)}
    for axis, (name, (layer, color)) in zip(axes[1:], layers.items(), strict=True):
        norm = layer(use_running_average=False)
        variables = norm.init(jax.random.key(1), x)
        y, _ = norm.apply(variables, x, mutable=["batch_stats"])
        axis.hist(np.ravel(y), 60, color=color)
        axis.set_title(f"{name}:\ndeviation {float(y.std()):.1f}")
    axes[0].ticklabel_format(useOffset=False)
    for axis in axes:
        axis.set_yticks([])
    return figure
