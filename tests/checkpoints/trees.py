"""The trees in the checkpoints: every layer as a function, in a linen and in an nnx model.

Values are made from a seed, so that what is read can be compared with what was meant.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.contract.layers import LAYERS, arguments

SEED, SHAPE = 2015, (4, 3, 4)
# The trees of the first are those of batch_norm; the others are younger than the checkpoints.
LEFT_OUT = ("activated_batch_norm", "global_response_norm", "running_norm")
STORED = [layer for layer in LAYERS if layer.name not in LEFT_OUT]
# Variants that are younger than the checkpoints. Their trees are those of other variants.
YOUNGER = ("offset", "deviation", "causal", "causal-masked")
LAYERS_OF_DOORS = (
    "BatchRenorm",
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "InstanceNorm",
    "FilterResponseNorm",
    "DynamicTanh",
)
WRAPPERS = ("WeightNorm", "SpectralNorm", "WeightStandardization")
SETTINGS: dict[str, dict[str, Any]] = {
    "GroupNorm": {"num_groups": 2},
    "WeightStandardization": {"use_scale": True},
}


class Linen(nn.Module):
    """All adapters, one after the other, at inference."""

    @nn.compact
    def __call__(self, x):
        norms = nj.linen
        x = norms.BatchNorm(momentum=None, use_running_average=True, name="BatchNorm")(x)
        for name in LAYERS_OF_DOORS:
            running = {"use_running_average": True} if name == "BatchRenorm" else {}
            x = getattr(norms, name)(**SETTINGS.get(name, {}), **running, name=name)(x)
        x = norms.LocalResponseNorm(use_scale=True, name="LocalResponseNorm")(x)
        for name in WRAPPERS:
            flag = {"update_stats": False} if name == "SpectralNorm" else {}
            x = getattr(norms, name)(nn.Dense(4), **SETTINGS.get(name, {}), name=name)(x, **flag)
        return x


class NNX(nnx.Module):
    """The same in nnx, under the same names."""

    def __init__(self, rngs):
        norms = nj.nnx
        self.BatchNorm = norms.BatchNorm(4, momentum=None, use_running_average=True, rngs=rngs)
        for name in LAYERS_OF_DOORS:
            running = {"use_running_average": True} if name == "BatchRenorm" else {}
            setattr(
                self, name, getattr(norms, name)(4, **SETTINGS.get(name, {}), **running, rngs=rngs)
            )
        self.LocalResponseNorm = norms.LocalResponseNorm(4, use_scale=True, rngs=rngs)
        for name in WRAPPERS:
            dense = nnx.Linear(4, 4, rngs=rngs)
            setattr(self, name, getattr(norms, name)(dense, **SETTINGS.get(name, {}), rngs=rngs))
        self.eval()

    def __call__(self, x):
        for name in ("BatchNorm", *LAYERS_OF_DOORS, "LocalResponseNorm", *WRAPPERS):
            x = getattr(self, name)(x)
        return x


def away_from_the_start(tree):
    """Returns the tree with random leaves, each seeded by its name; counts are 7."""

    def other(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.asarray(7, leaf.dtype)
        rng = np.random.default_rng(
            [SEED, *jax.tree_util.keystr(path, simple=True, separator="/").encode()]
        )
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(other, tree)


def x():
    return jnp.asarray(np.random.default_rng(SEED).normal(1, 2, SHAPE), jnp.float32)


def linen_variables():
    return away_from_the_start(Linen().init(jax.random.key(0), jnp.ones(SHAPE)))


def linen_output(variables):
    return Linen().apply(variables, x())


def nnx_model():
    """With the values of the linen model."""
    model = NNX(nnx.Rngs(0))
    nnx.update(model, nj.convert.linen_to_nnx(linen_variables(), model))
    return model


def stored_settings(layer):
    """The settings of the variants that there are checkpoints of, by their names."""
    return {name: given for name, given in layer.settings.items() if name not in YOUNGER}


def functional():
    """`params` and `batch_stats` of each layer in each variant."""
    trees = {}
    for layer in STORED:
        for variant, settings in stored_settings(layer).items():
            params, batch_stats, _ = arguments(layer, settings, np.random.default_rng(SEED))
            params, batch_stats = away_from_the_start((params, batch_stats))
            trees[f"{layer.name}-{variant}"] = {"params": params, "batch_stats": batch_stats}
    return trees


def functional_outputs(trees):
    """y at inference, for each layer and variant that there is a tree of."""
    outputs = {}
    for layer in STORED:
        for variant, settings in stored_settings(layer).items():
            name = f"{layer.name}-{variant}"
            if name in trees:
                *_, x = arguments(layer, settings, np.random.default_rng(SEED))
                params, batch_stats = trees[name]["params"], trees[name]["batch_stats"]
                outputs[name] = layer.apply(params, batch_stats, x, False, **settings)[0]
    return outputs
