"""Networks as pure functions, made of layers with any normalization of the family.

    network = vgg(UNITS["group"])
    params, batch_stats = network.init(key, image_shape, num_classes)
    logits, batch_stats = network.apply(params, batch_stats, images, train)

A layer is `activation(normalize(x W))`, or `activation(x W + b)` if its normalization has no bias:
under batch normalization `b` would be subtracted again with the mean (Ioffe & Szegedy 2015, section
3.2). The kernels that a key gives are the same whatever the normalization.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import glorot_normal, he_normal

import normjax as nj

Tree = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Normalize = Callable[[Tree, Tree, Array, bool], tuple[Array, Tree]]

# Runs here are short: statistics over about the last 10 batches are meaningful after the first 50
# steps, those over the last 100 (0.99, the library's default) still carry the initial mean 0 and
# variance 1 then.
BATCH_NORM_MOMENTUM = 0.9


class Network(NamedTuple):
    """A network: how its parameters are made and what it computes from them."""

    init: Callable[[Array, Sequence[int], int], tuple[Tree, Tree]]
    apply: Callable[[Tree, Tree, Array, bool], tuple[Array, Tree]]


class Unit(NamedTuple):
    """What stands around a linear layer.

    Attributes:
      make: the parameters and statistics of the normalization, from a kernel.
      of_output: normalizes what the linear layer returns.
      of_kernel: normalizes its kernel.
      activation: what suits it; filter response norm has a threshold of its own instead.
      initializer: of the kernel; normalized or not makes no difference to it.
    """

    make: Callable[[Array], tuple[Tree, Tree]]
    of_output: Normalize | None = None
    of_kernel: Normalize | None = None
    activation: Callable[[Array], Array] = jax.nn.relu
    initializer: Callable[..., Array] = he_normal()

    def init(self, key: Array, shape: Sequence[int]) -> tuple[Tree, Tree]:
        """Returns the parameters and statistics of a layer with a kernel of the given shape."""
        kernel = self.initializer(key, tuple(shape), jnp.float32)
        norm, batch_stats = self.make(kernel)
        params: Tree = {"kernel": kernel, "norm": norm}
        if "bias" not in norm:
            params["bias"] = jnp.zeros(shape[-1])
        return params, batch_stats

    def apply(
        self, params: Tree, batch_stats: Tree, x: Array, train: bool, *, stride: int = 1
    ) -> tuple[Array, Tree]:
        """Returns the output, to be activated, and the statistics."""
        norm = params["norm"]
        if self.of_kernel is not None:
            kernel, batch_stats = self.of_kernel(norm, batch_stats, params["kernel"], train)
            params = params | {"kernel": kernel}
        y = linear(params, x, stride)
        if self.of_output is not None:
            return self.of_output(norm, batch_stats, y, train)
        return y, batch_stats


def from_features(init: Callable[..., tuple[Tree, Tree]]) -> Callable[[Array], tuple[Tree, Tree]]:
    """Makes parameters from the number of output features."""
    return lambda kernel: init(kernel.shape[-1])


def batch(**settings: Any) -> Unit:
    """Returns batch norm with other settings."""
    settings = {"momentum": BATCH_NORM_MOMENTUM} | settings

    def normalize(*arguments: Any) -> tuple[Array, Tree]:
        # Looked up when it is called: benchmarks put another library's layer in its place.
        return nj.batch_norm(*arguments, **settings)

    return Unit(from_features(nj.batch_norm_init), normalize)


def renorm(**settings: Any) -> Unit:
    """Returns batch renorm with other settings."""
    settings = {"momentum": BATCH_NORM_MOMENTUM} | settings
    return Unit(from_features(nj.batch_renorm_init), partial(nj.batch_renorm, **settings))


def _layer(params: Tree, batch_stats: Tree, x: Array, train: bool) -> tuple[Array, Tree]:
    """Layer norm over an example's pixels and channels (Wu & He 2018, section 3.1)."""
    return nj.layer_norm(params, batch_stats, x, train, reduction_axes=tuple(range(1, x.ndim)))


UNITS: dict[str, Unit] = {
    "none": Unit(lambda kernel: ({}, {})),
    "batch": batch(),
    "renorm": renorm(),
    "group": Unit(from_features(nj.group_norm_init), partial(nj.group_norm, group_size=8)),
    "layer": Unit(from_features(nj.layer_norm_init), _layer),
    "filter response": Unit(
        from_features(nj.filter_response_norm_init), nj.filter_response_norm, activation=lambda y: y
    ),
    "dynamic tanh": Unit(from_features(nj.dynamic_tanh_init), nj.dynamic_tanh),
    "weight norm": Unit(nj.weights.weight_norm_init, of_kernel=nj.weights.weight_norm),
    "weight standardization": Unit(
        from_features(nj.weights.weight_standardization_init),
        of_kernel=partial(nj.weights.weight_standardization, scaled=True),
    ),
}


def style(normalize: bool, activation: str) -> Unit:
    """Returns the unit with batch norm or none, and "relu" or "sigmoid" after it."""
    unit = UNITS["batch" if normalize else "none"]
    if activation == "sigmoid":
        unit = unit._replace(activation=jax.nn.sigmoid, initializer=glorot_normal())
    return unit


def network(
    unit: Unit,
    shapes: Callable[[Sequence[int]], Shapes],
    forward: Callable[..., Array],
    features: int,
) -> Network:
    """Returns a network of units, with kernels of the `shapes`, and a linear layer, "logits".

    `forward(layer, images)` returns the `features` that the last one gets; `layer(name, x, stride)`
    applies a layer.
    """

    def init(key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        named = shapes(image_shape)
        *keys, last = jax.random.split(key, len(named) + 1)
        params: Tree = {}
        batch_stats: Tree = {}
        for layer_key, (name, shape) in zip(keys, named.items(), strict=True):
            params[name], stats = unit.init(layer_key, shape)
            batch_stats |= {name: stats} if stats else {}
        kernel = glorot_normal()(last, (features, num_classes), jnp.float32)
        return params | {"logits": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}, batch_stats

    def apply(params: Tree, batch_stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        new_stats: Tree = {}

        def layer(name: str, x: Array, stride: int = 1) -> Array:
            old = batch_stats.get(name, {})
            y, stats = unit.apply(params[name], old, x, train, stride=stride)
            new_stats.update({name: stats} if stats else {})
            return unit.activation(y)

        return linear(params["logits"], forward(layer, images)), new_stats

    return Network(init, apply)


def mlp(unit: Unit, depth: int = 3, width: int = 100) -> Network:
    """Returns the network of the 2015 paper's section 4.1: `depth` hidden layers of `width`."""

    def shapes(image_shape: Sequence[int]) -> Shapes:
        height, image_width, channels = image_shape
        inputs = [height * image_width * channels, *[width] * (depth - 1)]
        return {f"hidden_{i}": (inputs[i], width) for i in range(depth)}

    def forward(layer: Callable[..., Array], images: Array) -> Array:
        x = images.reshape(len(images), -1)
        for i in range(depth):
            x = layer(f"hidden_{i}", x)
        return x

    return network(unit, shapes, forward, width)


def vgg(
    unit: Unit, widths: Sequence[Sequence[int]] = ((16, 16), (32, 32)), stride: int = 1
) -> Network:
    """Returns a small VGG (Simonyan & Zisserman 2015).

    It has a group of 3x3 convolutions for each of `widths`, max pooling between groups, and then
    the pixels' mean. `stride` is the stride of the first convolution.
    """
    layers = {
        f"conv_{g}_{i}": width for g, group in enumerate(widths) for i, width in enumerate(group)
    }

    def shapes(image_shape: Sequence[int]) -> Shapes:
        inputs = [image_shape[-1], *layers.values()]
        return {
            name: (3, 3, channels, width)
            for channels, (name, width) in zip(inputs, layers.items(), strict=False)
        }

    def forward(layer: Callable[..., Array], images: Array) -> Array:
        x = images
        for name in layers:
            if name.endswith("_0") and x is not images:
                x = max_pool(x)
            x = layer(name, x, stride if x is images else 1)
        return x.mean((1, 2))

    return network(unit, shapes, forward, widths[-1][-1])


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
    return jnp.concatenate(
        [x[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)],
        axis=-1,
    )


def max_pool(x: Array) -> Array:
    """Returns the largest of each 2x2 pixels; an odd row or column at the end is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
