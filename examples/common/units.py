"""Linear layers with any normalization of the family: `activation(normalize(x W))`, by name.

    unit = UNITS["group"]
    params, batch_stats = unit.init(key, (3, 3, 16, 32))
    y, batch_stats = unit.apply(params, batch_stats, x, train)    # before the activation

A unit that normalizes its output has no bias of its own where the normalization has one. The
kernels that a key gives are the same in all units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import normjax as nj
from common.networks import BATCH_NORM_MOMENTUM, Tree, linear

Normalize = Callable[[Tree, Tree, Array, bool], tuple[Array, Tree]]
he_normal = jax.nn.initializers.he_normal()


class Unit(NamedTuple):
    """What stands around a linear layer.

    Attributes:
      make: the parameters and statistics of the normalization, from a kernel.
      of_output: normalizes what the linear layer returns.
      of_kernel: normalizes its kernel.
      activation: what suits it behind; filter response norm has a threshold of its own instead.
    """

    make: Callable[[Array], tuple[Tree, Tree]]
    of_output: Normalize | None = None
    of_kernel: Normalize | None = None
    activation: Callable[[Array], Array] = jax.nn.relu

    def init(self, key: Array, shape: Sequence[int]) -> tuple[Tree, Tree]:
        """Returns the parameters and statistics of a layer with a kernel of the given shape."""
        kernel = he_normal(key, tuple(shape), jnp.float32)
        norm, batch_stats = self.make(kernel)
        params: Tree = {"kernel": kernel, "norm": norm}
        if "bias" not in norm:
            params["bias"] = jnp.zeros(shape[-1])
        return params, batch_stats

    def apply(
        self, params: Tree, batch_stats: Tree, x: Array, train: bool, *, stride: int = 1
    ) -> tuple[Array, Tree]:
        """Returns the output, to be activated, and the statistics."""
        if self.of_kernel is not None:
            kernel, batch_stats = self.of_kernel(
                params["norm"], batch_stats, params["kernel"], train
            )
            params = params | {"kernel": kernel}
        y = linear(params, x, stride)
        if self.of_output is not None:
            return self.of_output(params["norm"], batch_stats, y, train)
        return y, batch_stats


def _by(init: Callable[..., tuple[Tree, Tree]]) -> Callable[[Array], tuple[Tree, Tree]]:
    """Makes parameters from the number of output features."""
    return lambda kernel: init(kernel.shape[-1])


def batch(**settings: Any) -> Unit:
    """Returns batch norm with other settings."""
    settings = {"momentum": BATCH_NORM_MOMENTUM} | settings
    return Unit(_by(nj.batch_norm_init), partial(nj.batch_norm, **settings))


def renorm(**settings: Any) -> Unit:
    """Returns batch renorm with other settings."""
    settings = {"momentum": BATCH_NORM_MOMENTUM} | settings
    return Unit(_by(nj.batch_renorm_init), partial(nj.batch_renorm, **settings))


def _layer(params: Tree, batch_stats: Tree, x: Array, train: bool) -> tuple[Array, Tree]:
    """Layer norm over an example's pixels and channels (Wu & He 2018, section 3.1)."""
    return nj.layer_norm(params, batch_stats, x, train, reduction_axes=tuple(range(1, x.ndim)))


UNITS: dict[str, Unit] = {
    "none": Unit(lambda kernel: ({}, {})),
    "batch": batch(),
    "renorm": renorm(),
    "group": Unit(_by(nj.group_norm_init), partial(nj.group_norm, group_size=8)),
    "layer": Unit(_by(nj.layer_norm_init), _layer),
    "filter response": Unit(
        _by(nj.filter_response_norm_init), nj.filter_response_norm, activation=lambda y: y
    ),
    "dynamic tanh": Unit(_by(nj.dynamic_tanh_init), nj.dynamic_tanh),
    "weight norm": Unit(nj.weights.weight_norm_init, of_kernel=nj.weights.weight_norm),
    "weight standardization": Unit(
        _by(nj.weights.weight_standardization_init),
        of_kernel=partial(nj.weights.weight_standardization, scaled=True),
    ),
}
