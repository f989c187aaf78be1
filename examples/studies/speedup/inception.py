"""A small BN-Inception, in the proportions of Ioffe & Szegedy (2015), figure 5.

With 3 modules, each is the paper's inception (3a) at its own width. With 10, they are the paper's
ten, 3a to 5b, all at one width: 8 channels for the paper's 64. What differs from the paper, whose
images have 224 x 224 pixels:

- One 3x3 convolution stands before the modules, in place of two convolutions and three poolings.
  Its stride is 2, unless the image is small. So images of 32 x 32 pixels reach the ten modules as
  16 x 16, and later 8 x 8 and 4 x 4; in the paper they have 28, 14 and 7 pixels a side.
- Where the paper's table contradicts itself, the channels of the branches count, not their sum.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from common.networks import Network, Shapes, Unit, max_pool, neighbours, network
from jax import Array, lax


class Module(NamedTuple):
    """The channels of a module's convolutions, 0 for one that is not there; and its pooling.

    A module of `stride` 2 halves the image, and passes the pooled input on as it is. `pooled`
    halves the image before the module.
    """

    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: int
    largest: bool = False  # of 3x3 pixels; else their average
    stride: int = 1
    pooled: bool = False

    def shapes(self, name: str, channels: int) -> Shapes:
        """Returns the shapes of the kernels by name, those that are there."""
        shapes = {
            "one": (1, 1, channels, self.one),
            "three_reduce": (1, 1, channels, self.three_reduce),
            "three": (3, 3, self.three_reduce, self.three),
            "double_reduce": (1, 1, channels, self.double_reduce),
            "double_a": (3, 3, self.double_reduce, self.double),
            "double_b": (3, 3, self.double, self.double),
            "pool": (1, 1, channels, self.pool),
        }
        return {f"{name}/{branch}": shape for branch, shape in shapes.items() if shape[-1]}

    def outputs(self, channels: int) -> int:
        """Returns the channels that the module makes of so many."""
        return self.one + self.three + self.double + (self.pool or channels)

    def apply(self, layer: Callable[..., Array], name: str, x: Array) -> Array:
        """Returns the outputs of all branches."""
        x = max_pool(x) if self.pooled else x
        three = layer(f"{name}/three_reduce", x)
        double = layer(f"{name}/double_a", layer(f"{name}/double_reduce", x))
        pool = _largest_3x3(x, self.stride) if self.largest else _average_3x3(x)
        branches = [
            layer(f"{name}/three", three, self.stride),
            layer(f"{name}/double_b", double, self.stride),
            layer(f"{name}/pool", pool) if self.pool else pool,
        ]
        branches = [layer(f"{name}/one", x), *branches] if self.one else branches
        return jnp.concatenate(branches, axis=-1)


PAPER = {
    "3a": Module(64, 64, 64, 64, 96, 32),
    "3b": Module(64, 64, 96, 64, 96, 64),
    "3c": Module(0, 128, 160, 64, 96, 0, largest=True, stride=2),
    "4a": Module(224, 64, 96, 96, 128, 128),
    "4b": Module(192, 96, 128, 96, 128, 128),
    "4c": Module(160, 128, 160, 128, 160, 128),
    "4d": Module(96, 128, 192, 160, 192, 128),
    "4e": Module(0, 128, 192, 192, 256, 0, largest=True, stride=2),
    "5a": Module(352, 192, 320, 160, 224, 128),
    "5b": Module(352, 192, 320, 192, 224, 128, largest=True),
}


def inception(unit: Unit, stem: int = 24, widths: Sequence[int] = (16, 32, 32)) -> Network:
    """Returns a network with a module for each of `widths`, with the proportions of (3a).

    Max pooling halves the image where the width grows, and before the first module unless the image
    is small, so that the modules get 7x7 or 8x8 pixels.
    """

    def modules(large: bool) -> dict[str, Module]:
        before = [0 if large else widths[0], *widths]
        return {
            f"module_{i}": Module(
                width, width, width, width, width * 3 // 2, width // 2, pooled=width > before[i]
            )
            for i, width in enumerate(widths)
        }

    return _network(unit, stem, modules)


def inception_of_ten(unit: Unit, width: int = 8) -> Network:
    """Returns a network with the paper's ten modules, `width` channels for each 64 of theirs."""
    modules = {}
    for name, module in PAPER.items():
        channels = (each * width // 64 for each in module[:6])
        modules[name] = Module._make((*channels, *module[6:]))
    return _network(unit, 192 * width // 64, lambda large: modules)


def _network(unit: Unit, stem: int, modules: Callable[[bool], dict[str, Module]]) -> Network:
    """Returns the network of the modules for large images, or for small ones."""

    def is_large(image_shape: Sequence[int]) -> bool:
        return image_shape[0] >= 16

    def shapes(image_shape: Sequence[int]) -> Shapes:
        found: Shapes = {"stem": (3, 3, image_shape[-1], stem)}
        channels = stem
        for name, module in modules(is_large(image_shape)).items():
            found |= module.shapes(name, channels)
            channels = module.outputs(channels)
        return found

    def forward(layer: Callable[..., Array], images: Array) -> Array:
        large = is_large(images.shape[1:])
        x = layer("stem", images, 2 if large else 1)
        for name, module in modules(large).items():
            x = module.apply(layer, name, x)
        return x.mean((1, 2))

    channels = stem
    for module in modules(True).values():
        channels = module.outputs(channels)
    return network(unit, shapes, forward, channels)


def _average_3x3(x: Array) -> Array:
    return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / 9


def _largest_3x3(x: Array, stride: int) -> Array:
    """Returns the largest of 3x3 pixels, of activations, which are not below the border's zeros."""
    nine = neighbours(x, stride)
    return nine.reshape(*nine.shape[:3], 9, -1).max(-2)
