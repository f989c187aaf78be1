"""`from_haiku` and `to_haiku` against Haiku's own modules, training continued on each side."""

from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, assert_trees_close
from tests.convert.training import TOLERANCE, batches, step
from tests.marks import slow_after

DECAY = 0.8
IMAGES = (4, 5, 5, 6)
pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")  # Haiku, too, mixes dtypes


def batch_norm(params, batch_stats, x, train, **settings):
    momentum = nj.convert.haiku_momentum(DECAY, batch_stats["count"])
    return nj.batch_norm(params, batch_stats, x, train, momentum=momentum, **settings)


class SpectralLinear(hk.Module):
    """A linear layer whose weights are normalized."""

    def __call__(self, x, is_training):
        w = hk.get_parameter("w", (x.shape[-1], 4), x.dtype, hk.initializers.RandomNormal())
        b = hk.get_parameter("b", (4,), x.dtype, jnp.zeros)
        return x @ hk.SpectralNorm(eps=1e-12)(w, update_stats=is_training) + b


def spectral_linear(params, batch_stats, x, train):
    kernel, batch_stats = nj.weights.spectral_norm({}, batch_stats, params["kernel"], train)
    return x @ kernel + params["bias"], batch_stats


def without_flag(make):
    return lambda x, is_training: make()(x)


def with_flag(make):
    return lambda x, is_training: make()(x, is_training)


CASES = {  # what Haiku does, the shape of x, normjax's function and its settings
    "BatchNorm": (with_flag(lambda: hk.BatchNorm(True, True, DECAY)), IMAGES, batch_norm, {}),
    "BatchNorm, rank 2": (
        with_flag(lambda: hk.BatchNorm(True, False, DECAY, eps=1e-3)),
        (8, 6),
        batch_norm,
        {"epsilon": 1e-3},
    ),
    "BatchNorm, plain": (
        with_flag(lambda: hk.BatchNorm(False, False, DECAY)),
        IMAGES,
        batch_norm,
        {},
    ),
    "BatchNorm, offset, channels first": (
        with_flag(lambda: hk.BatchNorm(False, True, DECAY, data_format="channels_first")),
        IMAGES,
        batch_norm,
        {"feature_axes": 1},
    ),
    "BatchNorm of one channel": (
        with_flag(lambda: hk.BatchNorm(True, True, DECAY)),
        (9, 1),
        batch_norm,
        {},
    ),
    "LayerNorm": (
        without_flag(lambda: hk.LayerNorm(-1, True, True, param_axis=-1)),
        IMAGES,
        nj.layer_norm,
        {},
    ),
    "LayerNorm, axis 1": (
        without_flag(lambda: hk.LayerNorm((1, 2), True, True, param_axis=(1, 2))),
        IMAGES,
        nj.layer_norm,
        {"reduction_axes": (1, 2), "feature_axes": (1, 2)},
    ),
    "RMSNorm": (without_flag(lambda: hk.RMSNorm(-1)), IMAGES, nj.rms_norm, {"epsilon": 1e-5}),
    "GroupNorm": (without_flag(lambda: hk.GroupNorm(3)), IMAGES, nj.group_norm, {"num_groups": 3}),
    "InstanceNorm": (
        without_flag(lambda: hk.InstanceNorm(True, True)),
        IMAGES,
        nj.instance_norm,
        {},
    ),
    "SpectralNorm": (with_flag(SpectralLinear), (8, 6), spectral_linear, {}),
}


def side_of(net):
    """Haiku's params and state for normjax's, so that both sides take the same step of descent."""

    @jax.jit
    def train(params, state, x, weights):
        return step(lambda p, s, x: net.apply(p, s, None, x, True), params, state, x, weights)

    return train


def ours(apply, settings):
    """Networks of one layer, whose name is that of Haiku's only module with params or state."""

    def train(params, batch_stats, x):
        (name,) = {*params, *batch_stats} - {
            "spectral_linear/spectral_norm",
            "spectral_linear/~/spectral_norm",
        } or {""}
        inside = next((module for module in batch_stats if module.startswith(name)), name)
        y, new = apply(params.get(name, {}), batch_stats.get(inside, {}), x, True, **settings)
        return y, {inside: new} if new else batch_stats

    return jax.jit(lambda *args: step(train, *args))


def train_both(net, sides, haiku, trees, shape, seed):
    for x, weights in batches(seed, shape):
        theirs, *haiku = sides[0](*haiku, x, weights)
        y, *trees = sides[1](*trees, x, weights)
        assert_close(y, theirs, **TOLERANCE)
        assert_trees_close(
            tuple(trees), nj.convert.from_haiku(*haiku, like=tuple(trees)), **TOLERANCE
        )
    return haiku, trees


@pytest.mark.parametrize("name", slow_after(2, CASES))
def test_training_goes_on_alike_on_both_sides(name):
    make, shape, apply, settings = CASES[name]
    net = hk.transform_with_state(make)
    start = jax.jit(net.init, static_argnums=2)(jax.random.key(0), jnp.zeros(shape), True)
    sides = side_of(net), ours(apply, settings)
    haiku = start
    for x, weights in list(batches(1, shape))[:3]:
        _, *haiku = sides[0](*haiku, x, weights)
    haiku, trees = train_both(net, sides, haiku, nj.convert.from_haiku(*haiku), shape, seed=2)

    back = nj.convert.to_haiku(*trees, decay_rate=DECAY, like=start)
    assert_trees_close(back, tuple(haiku), **TOLERANCE)
    train_both(net, sides, back, trees, shape, seed=3)

    x = jnp.asarray(np.random.default_rng(4).normal(size=shape), jnp.float32)
    if "Batch" in name:
        expected, _ = jax.jit(partial(net.apply, is_training=False))(*haiku, None, x)
        (params,) = trees[0].values() or ({},)
        y, _ = jax.jit(partial(apply, train=False, **settings))(params, *trees[1].values(), x)
        assert_close(y, expected, **TOLERANCE)


def test_training_starts_alike_from_nothing():
    net = hk.transform_with_state(with_flag(lambda: hk.BatchNorm(True, True, DECAY)))
    haiku = net.init(jax.random.key(0), jnp.zeros(IMAGES), True)
    assert nj.convert.from_haiku(*haiku)[1]["batch_norm"]["count"] == 0
    train_both(
        net,
        (side_of(net), ours(batch_norm, {})),
        haiku,
        nj.convert.from_haiku(*haiku),
        IMAGES,
        seed=1,
    )


@pytest.mark.slow
def test_statistics_without_a_count_go_on_as_with_a_plain_momentum():
    net = hk.transform_with_state(with_flag(lambda: hk.BatchNorm(True, True, DECAY)))
    start = net.init(jax.random.key(0), jnp.zeros(IMAGES), True)
    params, batch_stats = nj.batch_norm_init(6)
    haiku = nj.convert.to_haiku(
        {"batch_norm": params}, {"batch_norm": batch_stats}, decay_rate=DECAY, like=start
    )
    theirs = jax.jit(partial(net.apply, is_training=True))
    ours = jax.jit(partial(nj.batch_norm, train=True, momentum=DECAY))
    for x, _ in batches(1, IMAGES):
        _, state = theirs(*haiku, None, x)
        haiku = haiku[0], state
        _, batch_stats = ours(params, batch_stats, x)
        assert_close(
            state["batch_norm/~/mean_ema"]["average"].ravel(), batch_stats["mean"], **TOLERANCE
        )
        assert_close(
            state["batch_norm/~/var_ema"]["average"].ravel(), batch_stats["var"], **TOLERANCE
        )


@pytest.mark.slow
def test_a_network_of_linear_layers_and_embeddings_goes_there_and_back():
    def network(x):
        x = hk.LayerNorm(-1, True, True)(hk.Linear(4)(hk.Embed(7, 5)(x)))
        return hk.BatchNorm(True, True, DECAY)(hk.Conv1D(3, 2)(x), True)

    net = hk.transform_with_state(network)
    haiku = jax.jit(net.init)(jax.random.key(0), jnp.arange(6).reshape(2, 3))
    params, batch_stats = nj.convert.from_haiku(*haiku)
    assert jax.tree.map(jnp.shape, params)["conv1_d"] == {"kernel": (2, 4, 3), "bias": (3,)}
    assert jax.tree.map(jnp.shape, params)["embed"] == {"embedding": (7, 5)}
    assert_trees_close(
        nj.convert.to_haiku(params, batch_stats, decay_rate=DECAY, like=haiku), haiku
    )


@pytest.mark.parametrize("decay_rate", [0.0, 0.5, 0.999])
def test_the_momentum_is_that_of_the_corrected_average(decay_rate):
    rng, hidden, mean = np.random.default_rng(0), 0.0, 5.0
    for count, value in enumerate(rng.normal(3, 1, 30)):
        momentum = float(nj.convert.haiku_momentum(decay_rate, count))
        hidden = decay_rate * hidden + (1 - decay_rate) * value
        mean = momentum * mean + (1 - momentum) * value
        assert_close(mean, hidden / (1 - decay_rate ** (count + 1)), rtol=1e-6)
