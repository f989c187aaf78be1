"""A small BiT (Kolesnikov et al., 2020), with group norm and standardized kernels."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

import normjax as nj

NORMS = {"normjax": nj.linen.GroupNorm, "flax.linen": nn.GroupNorm}
EPSILON = 1e-10  # added to the standard deviation of a kernel, as in the published code


class StdConv(nn.Conv):
    """A convolution with the plain formula of weight standardization, as in BiT's code."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns a parameter; kernels are standardized."""
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = value - value.mean((0, 1, 2))
            value = value / (value.std((0, 1, 2)) + EPSILON)
        return value


def convolution(peer: str, features: int, size: int, strides: int = 1) -> nn.Module:
    """Returns a convolution with a kernel that normjax or the formula standardizes."""
    settings = {"strides": strides, "use_bias": False}
    if peer != "normjax":
        return StdConv(features, (size, size), **settings)
    return nj.linen.WeightStandardization(
        nn.Conv(features, (size, size), **settings), epsilon=EPSILON, epsilon_to="deviation"
    )


class Unit(nn.Module):
    """A bottleneck with norms before its convolutions."""

    peer: str
    width: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x, or its projection, plus the branch."""
        features, shortcut = 4 * self.width, x
        x = nn.relu(NORMS[self.peer]()(x))
        if shortcut.shape[-1] != features or self.strides > 1:
            shortcut = convolution(self.peer, features, 1, self.strides)(x)
        for size, strides in ((1, 1), (3, self.strides)):
            x = convolution(self.peer, self.width, size, strides)(x)
            x = nn.relu(NORMS[self.peer]()(x))
        return shortcut + convolution(self.peer, features, 1)(x)


class BiT26(nn.Module):
    """26 layers: a stem, 8 bottlenecks and a dense layer."""

    peer: str
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits."""
        x = convolution(self.peer, 64, 7, 2)(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for stage in range(4):
            for strides in (1 if stage == 0 else 2, 1):
                x = Unit(self.peer, 64 * 2**stage, strides)(x)
        x = nn.relu(NORMS[self.peer]()(x)).mean((1, 2))
        return nn.Dense(self.classes)(x)
