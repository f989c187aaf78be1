"""Why the length of a kernel before a normalization sets its effective learning rate."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from explained.style import OURS, REST, THEIRS, WIDTH
from jaxtyping import Array, Float

import normjax as nj

LEARNING_RATE = 0.5
STEPS = 12
START = np.array([0.8, -0.6])
SHORT, LONG = 0.6, 2.4


def outputs(kernel: Float[Array, " 2"], x: Float[Array, "examples 2"]) -> Float[Array, " examples"]:
    """A neuron with two weights, then batch norm."""
    params, batch_stats = nj.batch_norm_init(1)
    y, _ = nj.batch_norm(params, batch_stats, x @ kernel[:, None], train=True)
    return y[:, 0]


def loss(kernel: Float[Array, " 2"]) -> Float[Array, ""]:
    """The mean squared error of the neuron."""
    x_key, noise_key = jax.random.split(jax.random.key(3))
    x = jax.random.normal(x_key, (256, 2))
    targets = x @ jnp.array([0.6, 0.8]) + 0.3 * jax.random.normal(noise_key, (256,))
    return jnp.mean((outputs(kernel, x) - targets) ** 2)


def descend(kernel: Float[Array, " 2"]) -> tuple[Float[Array, "steps 2"], nj.diagnostics.Rotation]:
    """Takes steps of gradient descent; returns all kernels, and how each step turns them."""

    def step(kernel: Array, _: None) -> tuple[Array, tuple]:
        gradient = jax.grad(loss)(kernel)
        new = kernel - LEARNING_RATE * gradient
        found = nj.diagnostics.rotation(
            {"kernel": kernel}, {"kernel": gradient}, {"kernel": new}, learning_rate=LEARNING_RATE
        )
        return new, (kernel, found["kernel"])

    return jax.lax.scan(step, kernel, length=STEPS)[1]


def lengths() -> nj.diagnostics.Rotation:
    """Measures one step from the same direction at many lengths."""
    kernels = START * jnp.geomspace(0.5, 8, 9)[:, None]
    return jax.tree.map(lambda field: field[:, 0], jax.vmap(descend)(kernels)[1])


def scale_invariance() -> plt.Figure:
    """Draws the loss over the two weights with two descents, and what a kernel's length does."""
    figure, (plane, curves) = plt.subplots(2, 1, figsize=(WIDTH, 6.6), layout="constrained")
    draw_plane(plane)
    draw_curves(curves)
    return figure


def draw_plane(axis: plt.Axes) -> None:
    """Draws the loss as rays, and the steps of a short and of a long kernel."""
    across, up = jnp.meshgrid(jnp.linspace(-1, 4, 250), jnp.linspace(-2, 2, 200))
    losses = jax.lax.map(loss, jnp.stack([across.ravel(), up.ravel()], -1), batch_size=1000)
    filled = axis.contourf(across, up, losses.reshape(across.shape), 16, cmap="Greys", alpha=0.7)
    for length, color in ((SHORT, THEIRS), (LONG, OURS)):
        path, found = descend(length * START)
        axis.plot(*path.T, "o-", color=color, markersize=4, label=f"starts at length {length}")
        axis.annotate("", path[0], (0, 0), arrowprops={"arrowstyle": "-", "color": color})
    axis.plot(0, 0, "+", color="black")
    axis.set(aspect="equal", xlabel="first weight", ylabel="second weight")
    axis.set_title(f"{STEPS} steps of gradient descent; darker is a larger loss")
    axis.legend(loc="lower right")
    axis.figure.colorbar(filled, label="loss")


def draw_curves(axis: plt.Axes) -> None:
    """Draws the gradient, the step's angle and the effective learning rate against the length."""
    found = lengths()
    draw = partial(axis.loglog, found.norm, marker="o", markersize=4)
    draw(found.gradient_norm, color=THEIRS, label="length of the gradient: falls as 1 / length")
    draw(found.angle, color=REST, label="angle of a step, radians")
    draw(
        found.effective_learning_rate,
        color=OURS,
        label="effective learning rate: falls as 1 / length squared",
    )
    axis.set(xlabel="length of the kernel", xticks=(0.5, 1, 2, 4, 8), ylim=(5e-3, 200))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(loc="upper right")
