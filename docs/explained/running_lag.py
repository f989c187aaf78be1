"""Why running statistics lag."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import normjax as nj
from explained.style import WIDTH

STEPS = 600


def running_lag() -> plt.Figure:
    """Draws how fast the running variance reaches the batches' variance, for each momentum."""
    batches = 3 * jax.random.normal(jax.random.key(0), (STEPS, 256, 1))
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for momentum in (0.9, 0.99, 0.999, None):
        axis.plot(
            jnp.arange(1, STEPS + 1),
            running_variances(batches, momentum),
            label=f"momentum={momentum}",
        )
    axis.axhline(9, color="0.5", linewidth=0.8, linestyle="--")
    axis.set(xlabel="step", ylabel="running variance", title="The batches' variance is 9")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def running_variances(batches: jax.Array, momentum: float | None) -> jax.Array:
    """Returns the running variance after each batch."""
    _, batch_stats = nj.batch_norm_init(1, count=True)

    def step(batch_stats: dict, x: jax.Array) -> tuple[dict, jax.Array]:
        new = nj.update_batch_stats(batch_stats, nj.moments(x, 0), momentum=momentum)
        return new, new["var"][0]

    return jax.lax.scan(step, batch_stats, batches)[1]
