"""The two networks of the example, as pure functions over `normjax`.

    network = mlp(...)
    params, batch_stats = network.init(key, image_shape, num_classes)
    logits, batch_stats = network.apply(params, batch_stats, images, train)

A layer is `activation(batch_norm(W x))` with normalization and `activation(W x + b)` without: under
batch normalization `b` would be subtracted again with the mean, and the normalization's own bias
takes its place (Ioffe & Szegedy 2015, section 3.2). The kernels that a key gives are the same in
both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import normjax as nj

Tree = dict[str, Any]

# Runs here are short: statistics over about the last 10 batches are meaningful after the first 50
# steps, those over the last 100 (0.99, the library's default) still carry the initial mean 0 and
# variance 1 then.
BATCH_NORM_MOMENTUM = 0.9

# The usual initialization for each nonlinearity; normalized or not makes no difference to it.
ACTIVATIONS = {
    "relu": (jax.nn.relu, jax.nn.initializers.he_normal()),
    "sigmoid": (jax.nn.sigmoid, jax.nn.initializers.glorot_normal()),
}


class Network(NamedTuple):
    """A network: how its parameters are made and what it computes from them."""

    init: Callable[[Array, Sequence[int], int], tuple[Tree, Tree]]
    apply: Callable[[Tree, Tree, Array, bool], tuple[Array, Tree]]


class Style(NamedTuple):
    """What the variants of a network differ in."""

    normalize: bool
    activation: str


def mlp(style: Style, depth: int = 3, width: int = 100) -> Network:
    """Returns the network of the paper's section 4.1: `depth` hidden layers of `width` units."""

    def init(key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        height, image_width, channels = image_shape
        shapes = {"hidden_0": (height * image_width * channels, width)}
        shapes |= {f"hidden_{i}": (width, width) for i in range(1, depth)}
        return _init(key, shapes, (width, num_classes), style)

    def apply(params: Tree, batch_stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        layers = _Layers(params, batch_stats, style, train)
        x = images.reshape(len(images), -1)
        for i in range(depth):
            x = layers(f"hidden_{i}", x)
        return linear(params["logits"], x), layers.new_stats

    return Network(init, apply)


def inception(style: Style, stem: int = 24, widths: Sequence[int] = (16, 32, 32)) -> Network:
    """Returns a small BN-Inception: a convolution, a module for each of `widths`, and pooling.

    A module has the branches and the proportions of the paper's inception (3a): with `w` its width,
    1x1 (w), 3x3 (w, w), double 3x3 (w, 3w/2, 3w/2) and average pooling with projection (w/2): 4w
    channels. The first convolution has stride 2 and max pooling after it, unless the image is
    small, so that the modules get 7x7 or 8x8 pixels; max pooling halves them where the width grows.
    """

    def init(key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        shapes, channels = {"stem": (3, 3, image_shape[-1], stem)}, stem
        for i, width in enumerate(widths):
            module = _module_shapes(channels, width)
            shapes |= {f"module_{i}/{name}": shape for name, shape in module.items()}
            channels = 4 * width
        return _init(key, shapes, (channels, num_classes), style)

    def apply(params: Tree, batch_stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        layers = _Layers(params, batch_stats, style, train)
        large = images.shape[1] >= 16
        x = layers("stem", images, stride=2 if large else 1)
        for i, width in enumerate(widths):
            if large if i == 0 else width > widths[i - 1]:
                x = max_pool(x)
            x = _module(layers, f"module_{i}", x)
        return linear(params["logits"], x.mean((1, 2))), layers.new_stats

    return Network(init, apply)


def _module_shapes(channels: int, width: int) -> dict[str, tuple[int, ...]]:
    wider = width * 3 // 2
    return {
        "one": (1, 1, channels, width),
        "three_reduce": (1, 1, channels, width),
        "three": (3, 3, width, width),
        "double_reduce": (1, 1, channels, width),
        "double_a": (3, 3, width, wider),
        "double_b": (3, 3, wider, wider),
        "pool": (1, 1, channels, width // 2),
    }


def _module(layers: _Layers, name: str, x: Array) -> Array:
    def layer(branch: str, x: Array) -> Array:
        return layers(f"{name}/{branch}", x)

    three = layer("three", layer("three_reduce", x))
    double = layer("double_b", layer("double_a", layer("double_reduce", x)))
    return jnp.concatenate(
        [layer("one", x), three, double, layer("pool", _average_3x3(x))], axis=-1
    )


class _Layers:
    """Applies layers by name and collects their new statistics."""

    def __init__(self, params: Tree, batch_stats: Tree, style: Style, train: bool):
        self.params, self.batch_stats, self.style, self.train = params, batch_stats, style, train
        self.new_stats: Tree = {}

    def __call__(self, name: str, x: Array, stride: int = 1) -> Array:
        params, (activation, _) = self.params[name], ACTIVATIONS[self.style.activation]
        x = linear(params, x, stride)
        if self.style.normalize:
            x, self.new_stats[name] = nj.batch_norm(
                params["norm"], self.batch_stats[name], x, self.train, momentum=BATCH_NORM_MOMENTUM
            )
        return activation(x)


def _init(
    key: Array, shapes: dict[str, tuple[int, ...]], logits: tuple[int, int], style: Style
) -> tuple[Tree, Tree]:
    """Makes a layer per shape and a linear layer `logits`, which is never normalized."""
    initializer = ACTIVATIONS[style.activation][1]
    *keys, last = jax.random.split(key, len(shapes) + 1)
    params: Tree = {}
    batch_stats: Tree = {}
    for layer_key, (name, shape) in zip(keys, shapes.items(), strict=True):
        params[name] = {"kernel": initializer(layer_key, shape, jnp.float32)}
        if style.normalize:
            params[name]["norm"], batch_stats[name] = nj.batch_norm_init(shape[-1])
        else:
            params[name]["bias"] = jnp.zeros(shape[-1])
    kernel = jax.nn.initializers.glorot_normal()(last, logits, jnp.float32)
    params["logits"] = {"kernel": kernel, "bias": jnp.zeros(logits[-1])}
    return params, batch_stats


def linear(params: Tree, x: Array, stride: int = 1) -> Array:
    """Returns `x` times the kernel, a matrix or 1x1 or 3x3 convolution, plus an optional bias."""
    kernel = params["kernel"]
    if kernel.shape[:-2] == (3, 3):
        x = neighbours(x, stride)
    x = x @ kernel.reshape(-1, kernel.shape[-1])
    return x + params["bias"] if "bias" in params else x


def neighbours(x: Array, stride: int) -> Array:
    """Returns the 3x3 neighbours of each pixel as channels: convolutions become matrix products.

    On the CPU, XLA's own convolutions are about 12 times slower inside `lax.scan` than outside of
    it (JAX 0.10.2).
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [
        (slice(i, i + height, stride), slice(j, j + width, stride))
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate([x[:, rows, columns] for rows, columns in shifts], axis=-1)


def _average_3x3(x: Array) -> Array:
    return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / 9


def max_pool(x: Array) -> Array:
    """Returns the largest of each 2x2 pixels; an odd row or column at the end is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
