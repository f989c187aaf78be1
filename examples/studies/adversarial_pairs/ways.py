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

    def init(
        self, network: Network, key: Array, image_shape: Sequence[int]
    ) -> tuple[Tree, list[Tree]]:
        """Returns the parameters, and the statistics of clean and of adversarial images."""
        params, batch_stats = network.init(key, image_shape, CLASSES)
        return spread(params, 2) if self.own_scale else params, [batch_stats] * 2

    def apply(
        self,
        network: Network,
        params: Tree,
        batch_stats: list[Tree],
        images: Array,
        kind: int,
        train: bool,
    ) -> tuple[Array, Tree]:
        """Returns the logits of images of a kind, and the new statistics of that kind."""
        params = condition(params, jnp.asarray(kind)) if self.own_scale else params
        return network.apply(params, batch_stats[kind], images, train)

    def train(
        self, network: Network, params: Tree, batch_stats: list[Tree], clean: Array, attacked: Array
    ) -> tuple[Array, list[Tree]]:
        """Returns logits of clean and then of adversarial images, and all new statistics."""
        if self.own_statistics:
            pairs = [
                self.apply(network, params, batch_stats, images, kind, True)
                for kind, images in ((CLEAN, clean), (ATTACKED, attacked))
            ]
            return jnp.concatenate([logits for logits, _ in pairs]), [own for _, own in pairs]
        images = jnp.concatenate([clean, attacked]) if self.attacked else clean
        logits, new = self.apply(network, params, batch_stats, images, CLEAN, True)
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
