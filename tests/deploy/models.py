"""Models whose variables are drawn at random: folding is to be seen in every feature."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from normjax._trees import path_of


class Model(nn.Module):
    """A linen module made of a function that makes its layers as it goes."""

    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def drawn(variables, seed=0):
    """The same tree with random kernels, biases, scales and statistics."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path_of(path)[-1]
        if name in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
        if name not in ("kernel", "bias", "mean"):
            return leaf
        width = np.sqrt(max(1, np.prod(leaf.shape[:-1]))) if name == "kernel" else 1
        return jnp.asarray(rng.normal(size=leaf.shape) / width, leaf.dtype)

    return jax.tree.map_with_path(draw, variables)


def linen_model(function, x):
    """The model and its variables."""
    model = Model(function)
    return model, drawn(jax.jit(model.init)(jax.random.key(0), x))


class Block(nnx.Module):
    """A residual block: two convolutions beside the identity or a projection, with batch norms."""

    def __init__(self, norm, features_in, features, strides, rngs):
        conv = {"use_bias": False, "rngs": rngs}
        self.conv1 = nnx.Conv(features_in, features, (3, 3), strides, **conv)
        self.norm1 = norm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), **conv)
        self.norm2 = norm(features, rngs=rngs)
        self.shortcut = nnx.data(None)
        if features_in != features:
            self.shortcut = nnx.Conv(features_in, features, (1, 1), strides, **conv)
            self.shortcut_norm = norm(features, rngs=rngs)

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))))


class ResNet(nnx.Module):
    """A small ResNet with dropout before its head."""

    def __init__(self, norm, rngs):
        self.stem, self.stem_norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), norm(8, rngs=rngs)
        self.blocks = nnx.List([Block(norm, 8, 8, 1, rngs), Block(norm, 8, 16, 2, rngs)])
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((1, 2))))
