"""What backpropagation through the statistics of a batch does to a gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float

import normjax as nj
from explained.style import OURS, PALE, THEIRS, WIDTH

EXAMPLES = 64
TITLES = ("incoming g", "statistics as\nconstants", "through the\nstatistics")
COLORS = (PALE, THEIRS, OURS)
PARTS = (r"along $\mathbf{1}$", r"along $\hat{x}$", "the rest")


class Gradients(NamedTuple):
    """Gradients of one feature; the examples are in the order of their normalized values."""

    normalized: Float[Array, " examples"]
    incoming: Float[Array, " examples"]
    constants: Float[Array, " examples"]
    true: Float[Array, " examples"]


def gradients() -> Gradients:
    """Differentiates batch norm with its statistics as constants, and through them."""
    x_key, noise_key = jax.random.split(jax.random.key(0))
    x = 3 + 1.5 * jnp.sort(jax.random.normal(x_key, (EXAMPLES, 1)), 0)
    params, batch_stats = nj.batch_norm_init(1)
    own = {"mean": x.mean(0), "var": x.var(0)}

    def trained(x: jax.Array) -> jax.Array:
        return nj.batch_norm(params, batch_stats, x, train=True)[0]

    def frozen(x: jax.Array) -> jax.Array:
        return nj.batch_norm(params, own, x, train=False)[0]

    normalized, through = jax.vjp(trained, x)
    _, around = jax.vjp(frozen, x)
    noise = jax.random.normal(noise_key, x.shape)
    incoming = 1 + 0.8 * normalized + 0.5 * noise
    found = normalized, incoming, *around(incoming), *through(incoming)
    return Gradients(*(each[:, 0] for each in found))


def parts(gradient: Array, normalized: Array) -> Float[Array, " 3"]:
    """Splits a gradient into what is along the ones, along the normalized x, and the rest.

    Returns:
      The lengths of the three parts, which are orthogonal to each other.
    """
    ones = jnp.ones_like(normalized) / normalized.size**0.5
    x_hat = normalized / jnp.linalg.norm(normalized)
    rest = gradient - (gradient @ ones) * ones - (gradient @ x_hat) * x_hat
    return jnp.array([abs(gradient @ ones), abs(gradient @ x_hat), jnp.linalg.norm(rest)])


def derivative() -> plt.Figure:
    """Draws the three gradients against the normalized x, and the lengths of their parts."""
    found = gradients()
    figure, (clouds, bars) = plt.subplots(
        2, 3, figsize=(WIDTH, 4.4), sharey="row", layout="constrained", height_ratios=(3, 2)
    )
    for i, gradient in enumerate(found[1:]):
        draw_cloud(clouds[i], found.normalized, gradient, COLORS[i])
        clouds[i].set(title=TITLES[i], xticks=(-2, 0, 2))
        lengths = parts(gradient, found.normalized)
        drawn = bars[i].barh(PARTS, lengths, color=COLORS[i], edgecolor="0.3", linewidth=0.5)
        bars[i].bar_label(drawn, [f"{length:.1f}" for length in lengths], padding=2)
        bars[i].set(xlim=(0, 13), xticks=())
    bars[0].invert_yaxis()
    bars[1].set_xlabel("length of each part")
    clouds[0].set_ylabel("gradient of each example")
    clouds[1].set_xlabel(r"normalized value $\hat{x}$")
    return figure


def draw_cloud(axis: plt.Axes, normalized: Array, gradient: Array, color: str) -> None:
    """Draws a gradient, and the line through it that is nearest in squares."""
    axis.axhline(0, color="0.7", linewidth=0.8)
    axis.scatter(normalized, gradient, 12, color=color, edgecolor="0.3", linewidth=0.3)
    line = np.polyval(np.polyfit(normalized, gradient, 1), normalized)
    axis.plot(normalized, line, color="black", linewidth=1.5)
