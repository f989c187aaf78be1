"""A small VGG (Simonyan & Zisserman 2015): groups of 3x3 convolutions, max pooling between them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from common.networks import Network, Tree, linear, max_pool
from common.units import Unit


def vgg(
    unit: Unit, widths: Sequence[Sequence[int]] = ((16, 16), (32, 32)), stride: int = 1
) -> Network:
    """Returns the network: a group of convolutions for each of `widths`, then the pixels' mean.

    `stride` is the stride of the first convolution.
    """
    names = [
        [f"conv_{group}_{i}" for i in range(len(group_widths))]
        for group, group_widths in enumerate(widths)
    ]

    def init(key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        params: Tree = {}
        batch_stats: Tree = {}
        channels = image_shape[-1]
        flat = [
            pair for group in zip(names, widths, strict=True) for pair in zip(*group, strict=True)
        ]
        *keys, last = jax.random.split(key, len(flat) + 1)
        for layer_key, (name, width) in zip(keys, flat, strict=True):
            params[name], batch_stats[name] = unit.init(layer_key, (3, 3, channels, width))
            channels = width
        kernel = jax.nn.initializers.glorot_normal()(last, (channels, num_classes), jnp.float32)
        return params | {"logits": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}, batch_stats

    def apply(params: Tree, batch_stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        x, new_stats = images, {}
        for group, layers in enumerate(names):
            x = x if group == 0 else max_pool(x)
            for name in layers:
                own = stride if x is images else 1
                y, new_stats[name] = unit.apply(
                    params[name], batch_stats[name], x, train, stride=own
                )
                x = unit.activation(y)
        return linear(params["logits"], x.mean((1, 2))), new_stats

    return Network(init, apply)
