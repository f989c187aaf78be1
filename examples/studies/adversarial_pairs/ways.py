"""One network for clean and adversarial images: what the two share, and the adversary.

Ways are as in studies/domains/ways.py, with two domains: clean images and attacked ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from studies.domains.ways import Way

CLEAN, ATTACKED = range(2)
WAYS = {
    "clean only": Way(),
    "shared": Way(mixed=True),
    "two sets": Way(own_statistics=True),  # Xie & Yuille 2020
    "two sets, two scales": Way(own_statistics=True, own_scale=True),  # Xie et al. 2020
}


def attack(
    loss: Callable[[Array], Any], images: Array, key: Array, radius: float, steps: int
) -> Array:
    """Returns images with pixels in [0, 1] within `radius` of the given ones, at a larger loss.

    Uses projected gradient ascent from a random start (Madry et al. 2018), in steps of 2.5 radius /
    steps.
    """
    low, high = jnp.maximum(images - radius, 0), jnp.minimum(images + radius, 1)
    start = images + jax.random.uniform(key, images.shape, minval=-radius, maxval=radius)

    def ascend(x: Array, _: None) -> tuple[Array, None]:
        return jnp.clip(x + 2.5 * radius / steps * jnp.sign(jax.grad(loss)(x)), low, high), None

    return lax.stop_gradient(lax.scan(ascend, jnp.clip(start, low, high), length=steps)[0])
