"""The 2015 paper's network of sigmoids, with or without batch normalization and noise after it.

    network = Sigmoids(normalize=True, noise=True).network
    logits, batch_stats = network.apply(params, batch_stats, images, train)

The key of the noise is one of the statistics, and changes with each training step.
"""

from collections.abc import Sequence
from typing import Any

import jax
from common.networks import Network, Tree, linear, mlp, style
from jax import Array

DEPTH = 3
LAYERS = (*(f"hidden_{i}" for i in range(DEPTH)), "logits")

# Of the means and standard deviations that are drawn for each unit, and of those of its examples
# around them.
MEAN, DEVIATION, SPREAD = 0.5, 1.25, 0.1


class Sigmoids:
    """Three layers of 100 sigmoids and a linear one.

    Args:
      normalize: whether batch normalization stands before each sigmoid.
      noise: whether noise does, after the normalization, in training.
    """

    def __init__(self, normalize: bool, noise: bool = False):
        self.unit, self.noise = style(normalize, "sigmoid"), noise
        self.network = Network(self._init, lambda *arguments: self.forward(*arguments)[:2])

    def _init(self, key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        params, batch_stats = mlp(self.unit, DEPTH).init(key, image_shape, num_classes)
        noise = {"noise": jax.random.fold_in(key, 1)} if self.noise else {}
        return params, batch_stats | noise

    def forward(
        self, params: Tree, batch_stats: Tree, images: Array, train: bool
    ) -> tuple[Array, Tree, Tree]:
        """Returns the logits, the new statistics, and what goes into each layer of sigmoids."""
        x, new_stats, inputs = images.reshape(len(images), -1), dict(batch_stats), {}
        keys: Any = (None,) * DEPTH
        if self.noise:
            new_stats["noise"], key = jax.random.split(batch_stats["noise"])
            keys = jax.random.split(key, DEPTH)
        for name, key in zip(LAYERS[:-1], keys, strict=True):
            x, stats = self.unit.apply(params[name], batch_stats.get(name, {}), x, train)
            new_stats |= {name: stats} if stats else {}
            if key is not None and train:
                x = disturbed(key, x)
            inputs[name] = x
            x = self.unit.activation(x)
        return linear(params["logits"], x), new_stats, inputs


def disturbed(key: Array, x: Array) -> Array:
    """Returns x with noise, which has a random mean and deviation for each unit.

    After Santurkar et al. (2018), appendix A, Algorithm 1.
    """
    keys = jax.random.split(key, 4)
    units = x.shape[-1:]
    mean = jax.random.uniform(keys[0], units, minval=-MEAN, maxval=MEAN)
    deviation = jax.random.uniform(keys[1], units, minval=1.0, maxval=DEVIATION)
    shift = mean + jax.random.uniform(keys[2], x.shape, minval=-SPREAD, maxval=SPREAD)
    scale = deviation + SPREAD * jax.random.normal(keys[3], x.shape)
    return scale * x + shift
