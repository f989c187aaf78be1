"""ResNets (He et al. 2016; stem of stride 1 for small images) with batch norm over any group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers

from normjax.linen import BatchNorm

SMALL = 64  # pixels; the stem does not downsample images up to this size
STAGES = {"resnet8": (1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
he_normal = initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class Sharing(NamedTuple):
    """The examples that share statistics: `groups` of devices, or slices of a device's examples."""

    axis_name: str | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    virtual_batch_size: int | None = None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    features: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    expansion = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the block's output."""
        y = self.conv(self.features, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.features, (3, 3))(y)
        return nn.relu(self.norm(scale_init=initializers.zeros)(y) + _shortcut(self, x, y))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual connection."""

    features: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    expansion = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the block's output."""
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(y)))
        y = self.conv(self.expansion * self.features, (1, 1))(y)
        # Each block starts as the identity (Goyal et al. 2017, section 5.1).
        return nn.relu(self.norm(scale_init=initializers.zeros)(y) + _shortcut(self, x, y))


def _shortcut(block: BasicBlock | BottleneckBlock, x: Array, y: Array) -> Array:
    if x.shape == y.shape:
        return x
    x = block.conv(y.shape[-1], (1, 1), block.strides, name="shortcut")(x)
    return block.norm(name="shortcut_norm")(x)


class ResNet(nn.Module):
    """Maps images `(batch, height, width, 3)` to logits `(batch, classes)`, in float32."""

    network: str
    width: int
    classes: int
    sharing: Sharing = Sharing()
    momentum: float = 0.9
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits; in training the collection `batch_stats` has to be mutable."""
        conv = partial(
            nn.Conv, use_bias=False, padding="SAME", kernel_init=he_normal, dtype=self.dtype
        )
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            dtype=self.dtype,
            **self.sharing._asdict(),
        )
        small = max(x.shape[1:3]) <= SMALL
        x = conv(self.width, (3, 3) if small else (7, 7), 1 if small else 2, name="stem")(
            x.astype(self.dtype)
        )
        x = nn.relu(norm(name="stem_norm")(x))
        if not small:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        block = BottleneckBlock if self.network == "resnet50" else BasicBlock
        for stage, blocks in enumerate(STAGES[self.network]):
            for i in range(blocks):
                strides = 2 if stage > 0 and i == 0 else 1
                x = block(
                    self.width * 2**stage,
                    strides,
                    conv,
                    norm,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.classes, name="logits")(x)
