"""Why the length of a kernel before a normalization sets its effective learning rate."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float

import normjax as nj
from explained.style import OURS, REST, THEIRS, WIDTH

LEARNING_RATE = 0.3
STEPS = 10
START = np.array([0.8, -0.6])
SHORT, LONG = 1, 3


def outputs(kernel: Float[Array, " 2"], x: Float[Array, "examples 2"]) -> Float[Array, " examples"]:
    """A neuron with two weights, then batch norm."""
    params, batch_stats = nj.batch_norm_init(1)
    y, _ = nj.batch_norm(params, batch_stats, x @ kernel[:, None], train=True)
    return y[:, 0]


def examples() -> tuple[Float[Array, "256 2"], Float[Array, " 256"]]:
    """Returns inputs, and what the neuron should make of them."""
    x_key, noise_key = jax.random.split(jax.random.key(3))
    x = jax.random.normal(x_key, (256, 2))
    return x, x @ jnp.array([0.6, 0.8]) + 0.3 * jax.random.normal(noise_key, (256,))


def loss(kernel: Float[Array, " 2"]) -> Float[Array, ""]:
    """The mean squared error of the neuron."""
    x, targets = examples()
    return jnp.mean((outputs(kernel, x) - targets) ** 2)


def step(kernel: Float[Array, " 2"]) -> tuple[Float[Array, " 2"], nj.diagnostics.Rotation]:
    """Takes a step of gradient descent; returns the new kernel, and how the step turned it."""
    gradient = jax.grad(loss)(kernel)
    new = kernel - LEARNING_RATE * gradient
    found = nj.diagnostics.rotation(
        {"kernel": kernel}, {"kernel": gradient}, {"kernel": new}, learning_rate=LEARNING_RATE
    )
    return new, found["kernel"]


def descend(kernel: Float[Array, " 2"]) -> Float[Array, "steps 2"]:
    """Returns the kernel, and what it is after each step."""

    def then(kernel: Array, _: None) -> tuple[Array, Array]:
        return step(kernel)[0], kernel

    return jax.lax.scan(then, kernel, length=STEPS + 1)[1]


def lengths() -> nj.diagnostics.Rotation:
    """Measures a step from the same direction at many lengths."""
    kernels = START * jnp.geomspace(0.5, 8, 9)[:, None]
    return jax.vmap(step)(kernels)[1]


def invariance() -> nj.diagnostics.ScaleInvariance:
    """Measures how far the neuron's outputs depend on the length of its kernel."""
    x, _ = examples()
    return nj.diagnostics.scale_invariance({"kernel": START}, lambda w: outputs(w["kernel"], x))[
        "kernel"
    ]


def scale_invariance() -> plt.Figure:
    """Draws the loss over the two weights with two descents, and what a kernel's length does."""
    figure, (plane, curves) = plt.subplots(
        2, 1, figsize=(WIDTH, 7.4), layout="constrained", height_ratios=(3, 2)
    )
    draw_plane(plane)
    draw_curves(curves)
    return figure


def draw_plane(axis: plt.Axes) -> None:
    """Draws the loss as rays, and the steps of a short and of a long kernel."""
    angle, radius = np.meshgrid(np.linspace(-np.pi, np.pi, 361), [0.05, 1, 6])
    across, up = radius * np.cos(angle), radius * np.sin(angle)
    losses = jax.jit(jax.vmap(jax.vmap(loss)))(np.stack([across, up], -1))
    axis.contourf(across, up, losses, 16, cmap="Greys", alpha=0.7)
    for length, color, symbol in ((SHORT, THEIRS, "o-"), (LONG, OURS, "s-")):
        path = descend(length * START)
        axis.plot(
            *path.T, symbol, color=color, markersize=5, label=f"{STEPS} steps from length {length}"
        )
        axis.plot(*zip((0, 0), path[0], strict=True), ":", color=color)
    axis.plot(0, 0, "+", color="black")
    axis.set(aspect="equal", xlabel="first weight", ylabel="second weight")
    axis.set(xlim=(-1, 4.5), ylim=(-2, 2))
    axis.set_title(
        "The loss (darker is larger) is constant along rays: scaling has\n"
        f"{invariance().change:.0e} of the effect of a random change of that size"
    )
    axis.legend(loc="upper right")


def draw_curves(axis: plt.Axes) -> None:
    """Draws the gradient, the step's angle and the effective learning rate against the length."""
    found = lengths()
    draw = partial(axis.loglog, found.norm, markersize=5)
    draw(found.gradient_norm, "o-", color=THEIRS, label="length of the gradient, ~ 1 / length")
    draw(found.angle, "^-", color=REST, label="angle of a step, radians")
    draw(
        found.effective_learning_rate,
        "s-",
        color=OURS,
        label="effective learning rate, ~ 1 / length squared",
    )
    axis.set(xlabel="length of the kernel", xticks=(0.5, 1, 2, 4, 8), ylim=(2e-3, 500))
    axis.set_title(f"Cosine of kernel and gradient: at most {abs(found.cosine).max():.0e}")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(loc="upper right")
