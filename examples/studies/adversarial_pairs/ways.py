"""One network for clean and adversarial images: what the two share, and the adversary.

params, batch_stats = way.init(network, key, image_shape)  # batch_stats of clean, attacked images
logits, batch_stats = way.train(network, params, batch_stats, clean, attacked)
logits, _ = way.apply(network, params, batch_stats, images, ATTACKED, False)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from common.data import CLASSES
from common.networks import Network, Tree
from jax import Array, lax
from studies.domains.ways import condition, spread

CLEAN, ATTACKED = range(2)
Stats = list[Tree]  # batch_stats of clean images, and of attacked ones


class Way(NamedTuple):
    """What clean and adversarial images have of their own in a network.

    Attributes:
      attacked: whether there are adversarial images in training at all.
      own_statistics: whether each kind is normalized by itself, and has its batch_stats.
      own_scale: whether each kind has its scales and biases.
    """

    attacked: bool = True
    own_statistics: bool = False
    own_scale: bool = False

    def init(self, network: Network, key: Array, image_shape: Sequence[int]) -> tuple[Tree, Stats]:
        """Returns the parameters, and the statistics of clean and of adversarial images."""
        params, batch_stats = network.init(key, image_shape, CLASSES)
        return spread(params, 2) if self.own_scale else params, [batch_stats] * 2

    def apply(
        self, network: Network, params: Tree, stats: Stats, images: Array, kind: int, train: bool
    ) -> tuple[Array, Tree]:
        """Returns the logits of images of a kind, and the new statistics of that kind."""
        params = condition(params, jnp.asarray(kind)) if self.own_scale else params
        return network.apply(params, stats[kind], images, train)

    def train(
        self, network: Network, params: Tree, stats: Stats, clean: Array, attacked: Array
    ) -> tuple[Array, Stats]:
        """Returns logits of clean and then of adversarial images, and all new statistics."""
        if self.own_statistics:
            first, of_clean = self.apply(network, params, stats, clean, CLEAN, True)
            second, of_attacked = self.apply(network, params, stats, attacked, ATTACKED, True)
            return jnp.concatenate([first, second]), [of_clean, of_attacked]
        images = jnp.concatenate([clean, attacked]) if self.attacked else clean
        logits, new = self.apply(network, params, stats, images, CLEAN, True)
        return logits, [new] * 2


WAYS = {
    "clean only": Way(attacked=False),
    "shared": Way(),
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
