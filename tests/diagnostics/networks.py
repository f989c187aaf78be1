"""Small networks that normalize, healthy ones trained and sick ones made."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import normjax as nj

CLASSES, FEATURES, WIDTH = 4, 12, 24


def data(examples, seed=0):
    """Classes around centers of their own, off 0 and not of variance 1."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(1, 1, (CLASSES, FEATURES))
    labels = rng.integers(CLASSES, size=examples)
    return jnp.asarray(
        centers[labels] + 0.7 * rng.normal(size=(examples, FEATURES)), jnp.float32
    ), jnp.asarray(labels)


class Residual(nn.Module):
    """A residual network whose branches end in a scale that starts at 0."""

    norm: Callable[..., nn.Module] = nj.linen.BatchNorm
    momentum: float = 0.9
    blocks: int = 1

    @nn.compact
    def __call__(self, x, train):
        settings = (
            {"use_running_average": not train, "momentum": self.momentum}
            if self.has_statistics
            else {}
        )
        x = nn.relu(self.norm(**settings, name="stem_norm")(nn.Dense(WIDTH)(x)))
        for _ in range(self.blocks):
            y = nn.relu(self.norm(**settings)(nn.Dense(WIDTH)(x)))
            y = self.norm(**settings, scale_init=nn.initializers.zeros)(nn.Dense(WIDTH)(y))
            x = nn.relu(x + y)
        return nn.Dense(CLASSES)(x)

    @property
    def has_statistics(self):
        return getattr(self.norm, "__name__", None) in ("BatchNorm", "BatchRenorm")


@cache  # one function, so that it is compiled once
def updated(model):
    """The forward pass in training mode."""
    return lambda variables, x: model.apply(variables, x, True, mutable=["batch_stats"])


@cache
def _init(model):
    return jax.jit(partial(model.init, train=False))


def init(model, seed=0):
    return _init(model)(jax.random.key(seed), jnp.ones((2, FEATURES)))


def trained(model, steps=120, batch_size=64):
    """The variables after some steps of SGD with momentum, its rate annealed."""
    return jax.tree.map(lambda leaf: leaf, _trained(model, steps, batch_size))


@cache
def _trained(model, steps, batch_size):
    variables = init(model)
    params, rest = (
        variables["params"],
        {name: tree for name, tree in variables.items() if name != "params"},
    )
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)
    state = optimizer.init(params)

    @jax.jit
    def step(params, rest, state, x, labels):
        def loss(params):
            logits, new = updated(model)({"params": params, **rest}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), rest | dict(new), state

    with jax.numpy_dtype_promotion("standard"):
        for i in range(steps):
            params, rest, state = step(params, rest, state, *data(batch_size, seed=i + 1))
    return {"params": params, **rest}


class NNX(nnx.Module):
    def __init__(self, norm=nj.nnx.BatchNorm, momentum=0.5):
        rngs = nnx.Rngs(0)
        self.first, self.second = (
            nnx.Linear(FEATURES, WIDTH, rngs=rngs),
            nnx.Linear(WIDTH, WIDTH, rngs=rngs),
        )
        self.norms = nnx.List([norm(WIDTH, momentum=momentum, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.first(x)))
        return self.norms[1](self.second(x))


def healthy(seed=0, channels=32):
    """A layer's tree in good health, NumPy's, to be made sick."""
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "conv": {"kernel": rng.normal(size=(3, channels))},
            "norm": {
                "scale": rng.uniform(0.5, 1.5, channels),
                "bias": 0.1 * rng.normal(size=channels),
            },
        },
        "batch_stats": {
            "norm": {"mean": rng.normal(size=channels), "var": rng.uniform(0.1, 10, channels)}
        },
    }
