"""One network, several domains: who shares which statistics.

A way takes images `(domains, batch, pixels)` in training, and returns logits `(domains, batch,
classes)`:

    params, batch_stats = way.init(key, pixels, domains)
    logits, batch_stats = way.train(params, batch_stats, images)
    logits = way.infer(params, batch_stats, images, domain)  # images (batch, pixels) of one domain
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common.data import CLASSES, Dataset
from common.networks import UNITS, Tree, mlp
from jax import Array

NETWORK = mlp(UNITS["batch"], depth=2, width=128)
apply = NETWORK.apply
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


def init(key: Array, pixels: int) -> tuple[Tree, Tree]:
    """Returns the parameters of the network, and its running statistics."""
    return NETWORK.init(key, (1, pixels, 1), CLASSES)


class Way(NamedTuple):
    """A way to share.

    Attributes:
      batch_stats: in words.
      mixed: whether all domains are normalized together.
      own_statistics: whether each domain has its batch_stats; they are a list then.
      own_scale: whether each domain has its scales and biases.
    """

    batch_stats: str
    mixed: bool = False
    own_statistics: bool = False
    own_scale: bool = False

    def init(self, key: Array, pixels: int, domains: int) -> tuple[Tree, Any]:
        """Returns the parameters and the statistics."""
        params, batch_stats = init(key, pixels)
        params = spread(params, domains) if self.own_scale else params
        return params, [batch_stats] * domains if self.own_statistics else batch_stats

    def train(self, params: Tree, batch_stats: Any, images: Array) -> tuple[Array, Any]:
        """Returns the logits, and the new statistics."""
        if self.mixed:
            if self.own_scale:
                params = condition(params, jnp.repeat(jnp.arange(len(images)), images.shape[1]))
            together = images.reshape(-1, images.shape[-1])
            logits, batch_stats = apply(params, batch_stats, together, True)
            return logits.reshape(*images.shape[:2], -1), batch_stats
        logits, own = [], []
        for domain, batch in enumerate(images):
            old = batch_stats[domain] if self.own_statistics else batch_stats
            y, new = apply(params, old, batch, True)
            logits.append(y)
            own.append(new)
            batch_stats = batch_stats if self.own_statistics else new
        return jnp.stack(logits), own if self.own_statistics else batch_stats

    def infer(self, params: Tree, batch_stats: Any, images: Array, domain: int) -> Array:
        """Returns the logits of a domain's images."""
        if self.own_scale:
            params = condition(params, jnp.full(len(images), domain))
        own = batch_stats[domain] if self.own_statistics else batch_stats
        return apply(params, own, images, False)[0]


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
