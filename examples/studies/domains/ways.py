"""One network, several domains: who shares which statistics.

    params, batch_stats = way.init(network, key, image_shape, domains)
    logits, batch_stats = way.train(network, params, batch_stats, images)  # (domains, batch, ...)
    logits, _ = way.apply(network, params, batch_stats, images, domain, False)  # of one domain

A network is a pair of pure functions, see common/networks.py, so a second set of statistics is a
second variable.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common.data import CLASSES, Dataset
from common.networks import UNITS, Network, Tree, mlp
from jax import Array

NETWORK = mlp(UNITS["batch"], depth=2, width=128)
# Pixels from 0 to 1. A little noise keeps what is faint from being the same image in other units.
SHIFTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "faint": lambda pixels, rng: 0.6 + 0.2 * pixels + rng.normal(0, 0.05, pixels.shape),
    "inverted": lambda pixels, rng: 1 - pixels,
    "noisy": lambda pixels, rng: pixels + rng.normal(0, 0.5, pixels.shape),
}


def shifted(images: Dataset, shift: str) -> Dataset:
    """Returns the images with a shift, from 0 to 1; other random numbers shift those to test."""
    train, test = (
        SHIFTS[shift](pixels / images.peak, np.random.default_rng(seed))
        for seed, pixels in enumerate((images.train_images, images.test_images))
    )
    return images._replace(train_images=train, test_images=test, peak=1)


class Way(NamedTuple):
    """A way to share.

    Attributes:
      batch_stats: in words.
      mixed: whether all domains are normalized together.
      own_statistics: whether each domain has its batch_stats; they are a list then.
      own_scale: whether each domain has its scales and biases.
    """

    batch_stats: str = ""
    mixed: bool = False
    own_statistics: bool = False
    own_scale: bool = False

    def init(
        self, network: Network, key: Array, image_shape: Sequence[int], domains: int
    ) -> tuple[Tree, Any]:
        """Returns the parameters and the statistics."""
        params, batch_stats = network.init(key, image_shape, CLASSES)
        params = spread(params, domains) if self.own_scale else params
        return params, [batch_stats] * domains if self.own_statistics else batch_stats

    def train(
        self, network: Network, params: Tree, batch_stats: Any, images: Array
    ) -> tuple[Array, Any]:
        """Returns the logits `(domains, batch, classes)`, and the new statistics."""
        if self.mixed:
            if self.own_scale:
                params = condition(params, jnp.repeat(jnp.arange(len(images)), images.shape[1]))
            together = images.reshape(-1, *images.shape[2:])
            logits, batch_stats = network.apply(params, batch_stats, together, True)
            return logits.reshape(*images.shape[:2], -1), batch_stats
        logits, new = [], []
        for domain, batch in enumerate(images):
            y, own = self.apply(network, params, batch_stats, batch, domain, True)
            logits.append(y)
            new.append(own)
            batch_stats = batch_stats if self.own_statistics else own
        return jnp.stack(logits), new if self.own_statistics else batch_stats

    def apply(
        self, network: Network, params: Tree, batch_stats: Any, x: Array, domain: int, train: bool
    ) -> tuple[Array, Tree]:
        """Returns the logits of a domain's images, and the new statistics of that domain."""
        params = condition(params, jnp.asarray(domain)) if self.own_scale else params
        own = batch_stats[domain] if self.own_statistics else batch_stats
        return network.apply(params, own, x, train)


def condition(params: Tree, domains: Array) -> Tree:
    """Returns params with scales and biases for each example, `(batch, features)`.

    They are `(domains, features)` in `params`. One number as `domains` gives `(features,)`.
    """
    return _each_norm(params, lambda leaf: leaf[domains])


def spread(params: Tree, domains: int) -> Tree:
    """Returns params with scales and biases for each domain, `(domains, features)`, all equal."""
    return _each_norm(params, lambda leaf: jnp.tile(leaf, (domains, 1)))


def _each_norm(params: Tree, change: Callable[[Array], Array]) -> Tree:
    changed = dict(params)
    for name, layer in params.items():
        if "norm" in layer:
            norm = {leaf: change(value) for leaf, value in layer["norm"].items()}
            changed[name] = layer | {"norm": norm}
    return changed


WAYS = {
    "mixed": Way("one, batches of both domains", mixed=True),
    "in turn": Way("one, batches of one domain"),
    # Chang et al. 2019, Xie et al. 2020
    "own": Way("one for each domain", own_statistics=True),
    # de Vries et al. 2017
    "conditional": Way("one; scales, biases for each", mixed=True, own_scale=True),
}
