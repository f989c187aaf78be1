#!/usr/bin/env python3
"""Draws the explanatory pictures: `python docs/pictures.py`, half a minute.

They are written to docs/pages/images/. docs/gallery.py draws the pictures of results.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import normjax as nj

matplotlib.use("svg")
IMAGES = pathlib.Path(__file__).parent / "pages" / "images"
OURS, THEIRS = "tab:blue", "tab:orange"


def far_from_zero() -> plt.Figure:
    """Plots batch norm of 10,000 + noise in Flax and in normjax."""
    x = 1e4 + jax.random.normal(jax.random.key(0), (1024, 64))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained")
    axes[0].hist(np.ravel(x), 60, color="0.5")
    axes[0].set_title("x: 10,000 + noise")
    layers = {"flax.linen": (nn.BatchNorm, THEIRS), "normjax": (nj.linen.BatchNorm, OURS)}
    for axis, (name, (layer, color)) in zip(axes[1:], layers.items(), strict=True):
        norm = layer(use_running_average=False)
        variables = norm.init(jax.random.key(1), x)
        y, _ = norm.apply(variables, x, mutable=["batch_stats"])
        axis.hist(np.ravel(y), 60, color=color)
        axis.set_title(f"{name}: deviation {float(y.std()):.1f}")
    for axis in axes:
        axis.set_yticks([])
    return figure


def averaged_over() -> plt.Figure:
    """Plots which elements of a batch share a mean and a variance, for each layer."""
    sizes = {"examples": 4, "positions": 5, "channels": 6}
    example, position, channel = np.indices(tuple(sizes.values()))
    shared = {
        "batch norm": channel == 3,
        "layer norm, RMS norm": (example == 1) & (position == 2),
        "group norm": (example == 1) & (channel >= 3),
        "instance norm": (example == 1) & (channel == 3),
    }
    figure = plt.figure(figsize=(11, 3.2), layout="constrained")
    for i, (name, filled) in enumerate(shared.items()):
        axis = figure.add_subplot(1, 4, i + 1, projection="3d")
        axis.voxels(filled, facecolors=OURS, edgecolor="white", linewidth=0.5)
        axis.set(title=name, xlim=(0, 4), ylim=(0, 5), zlim=(0, 6))
        axis.set(**{f"{axis_name}label": of for axis_name, of in zip("xyz", sizes, strict=True)})
        axis.set(xticklabels=[], yticklabels=[], zticklabels=[])
        axis.set_box_aspect(tuple(sizes.values()), zoom=0.85)
        axis.view_init(22, -55)
    return figure


def running_lag() -> plt.Figure:
    """Plots how fast the running variance approaches the batch variance, for each momentum."""
    steps = 600
    batches = 3 * jax.random.normal(jax.random.key(0), (steps, 256, 1))
    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for momentum in (0.9, 0.99, 0.999, None):
        _, batch_stats = nj.batch_norm_init(1, count=True)

        def step(batch_stats: dict, x: jax.Array, momentum: float | None = momentum) -> tuple:
            new = nj.update_batch_stats(batch_stats, nj.moments(x, 0), momentum=momentum)
            return new, new["var"][0]

        _, var = jax.lax.scan(step, batch_stats, batches)
        axis.plot(jnp.arange(1, steps + 1), var, label=f"momentum={momentum}")
    axis.axhline(9, color="0.5", linewidth=0.8, linestyle="--")
    axis.set(xlabel="step", ylabel="running variance", title="The batches' variance is 9")
    axis.legend()
    return figure


def main() -> None:
    """Draws all pictures."""
    plt.rcParams["svg.hashsalt"] = "normjax"
    for draw in (far_from_zero, averaged_over, running_lag):
        path = IMAGES / f"{draw.__name__}.svg"
        draw().savefig(path, metadata={"Date": None})
        print(f"Written to {path}")


if __name__ == "__main__":
    main()
