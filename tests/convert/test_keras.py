"""`from_keras` and `to_keras` against Keras' own layers (on JAX), trained on each side."""

import inspect
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.convert.training import TOLERANCE, batches, step
from tests.marks import slow_after

IMAGES = (4, 5, 5, 6)
pytestmark = [
    pytest.mark.usefixtures("promotion_as_in_flax"),  # Keras, too, mixes dtypes
    # of its get_weights
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def spectral_dense(params, batch_stats, x, train, **settings):
    (name,) = params
    kernel, batch_stats = nj.weights.spectral_norm(
        {}, batch_stats, params[name]["kernel"], train, **settings
    )
    return x @ kernel + params[name]["bias"], batch_stats


CASES = {
    "BatchNormalization": (layers.BatchNormalization, IMAGES, nj.batch_norm),
    "BatchNormalization, axis 1": (
        lambda: layers.BatchNormalization(axis=1, momentum=0.9),
        IMAGES,
        nj.batch_norm,
    ),
    "BatchNormalization, plain": (
        lambda: layers.BatchNormalization(center=False, scale=False),
        (8, 6),
        nj.batch_norm,
    ),
    "BatchNormalization, no scale": (
        lambda: layers.BatchNormalization(scale=False),
        (8, 6),
        nj.batch_norm,
    ),
    "LayerNormalization": (layers.LayerNormalization, IMAGES, nj.layer_norm),
    "LayerNormalization of 2 axes": (
        lambda: layers.LayerNormalization(axis=(-2, -1)),
        IMAGES,
        nj.layer_norm,
    ),
    "RMSNormalization": (layers.RMSNormalization, IMAGES, nj.rms_norm),
    "GroupNormalization": (lambda: layers.GroupNormalization(3), IMAGES, nj.group_norm),
    "GroupNormalization of channels": (
        lambda: layers.GroupNormalization(-1),
        IMAGES,
        nj.group_norm,
    ),
    "SpectralNormalization": (
        lambda: layers.SpectralNormalization(layers.Dense(4), power_iterations=2),
        (8, 6),
        spectral_dense,
    ),
}


def keras_side(layer):
    """A step of descent on Keras' side, by its stateless API."""
    flag = {"training": True} if "training" in inspect.signature(layer.call).parameters else {}
    side = jax.jit(
        lambda *args: step(
            lambda params, state, x: layer.stateless_call(params, state, x, **flag), *args
        )
    )

    def train(x, weights):
        variables = layer.trainable_variables, layer.non_trainable_variables
        y, *values = side(
            *([variable.value for variable in group] for group in variables), x, weights
        )
        for variable, value in zip(sum(variables, []), sum(values, []), strict=True):
            variable.assign(value)
        return y

    return train


def initial(make, shape):
    keras.utils.set_random_seed(0)
    layer = make()
    layer.build(shape)
    train = keras_side(layer)
    for x, weights in list(batches(1, shape))[:3]:
        train(x, weights)
    return layer


def train_both(layer, side, params, batch_stats, shape, seed):
    train = keras_side(layer)
    for x, weights in batches(seed, shape):
        y, params, batch_stats = side(params, batch_stats, x, weights)
        assert_close(y, train(x, weights), **TOLERANCE)
        theirs = nj.convert.from_keras(layer)
        if "sigma" in batch_stats:  # theirs is that of the new kernel
            theirs[1]["sigma"] = batch_stats["sigma"]
        assert_trees_close((params, batch_stats), theirs, **TOLERANCE)
    return params, batch_stats


@pytest.mark.parametrize("name", slow_after(2, CASES))
def test_training_goes_on_alike_on_both_sides(name):
    make, shape, apply = CASES[name]
    layer = initial(make, shape)
    settings = nj.convert.keras_settings(layer)
    side = jax.jit(lambda *args: step(lambda p, s, x: apply(p, s, x, True, **settings), *args))
    params, batch_stats = train_both(layer, side, *nj.convert.from_keras(layer), shape, seed=2)

    other = make()
    other.build(shape)
    if "Spectral" in name:  # the wrapped layer's name is in the paths
        params = {other.layer.name: params[layer.layer.name]}
    other.set_weights(list(nj.convert.to_keras(params, batch_stats, like=other).values()))
    params, batch_stats = train_both(other, side, params, batch_stats, shape, seed=3)

    x = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    if "Spectral" not in name:  # Keras' layer does nothing at inference
        y, _ = apply(params, batch_stats, jnp.asarray(x), False, **settings)
        assert_close(y, other(x), **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_nothing_changes(name):
    make, shape, _ = CASES[name]
    layer = initial(make, shape)
    back = nj.convert.to_keras(*nj.convert.from_keras(layer), like=layer)
    assert_identical(list(back.values()), layer.get_weights())


@pytest.mark.slow
def test_a_model_goes_there_and_back_also_by_a_file(tmp_path):
    from safetensors.numpy import save_file

    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(name="bn"),
            layers.Dense(2),
        ],
        name="net",
    )
    params, batch_stats = nj.convert.from_keras(model)
    assert params["bn"]["scale"].shape == batch_stats["bn"]["var"].shape == (4,)
    weights = nj.convert.to_keras(params, batch_stats, like=model)
    assert_identical(list(weights.values()), model.get_weights())
    save_file(weights, tmp_path / "weights.safetensors")
    assert_identical(nj.convert.from_keras(tmp_path / "weights.safetensors"), (params, batch_stats))


def test_without_like_the_weights_come_in_keras_own_order():
    # which sorts the names
    params, batch_stats = jax.tree.map(lambda leaf: leaf, nj.batch_norm_init(2))
    layer = layers.BatchNormalization()
    layer.build((4, 2))
    layer.set_weights(list(nj.convert.to_keras(params, batch_stats).values()))
    assert_identical(nj.convert.from_keras(layer), (params, batch_stats))


def test_layers_without_weights_give_empty_trees():
    layer = layers.UnitNormalization()
    layer.build((4, 2))
    assert (
        nj.convert.from_keras(layer) == ({}, {}) and nj.convert.to_keras({}, {}, like=layer) == {}
    )


def test_what_normjax_has_no_settings_for_is_refused():
    message = "keras_settings: .* no equivalent of renorm=True.*got BatchNormalization"
    with pytest.raises(ValueError, match=message):
        nj.convert.keras_settings(layers.BatchNormalization(renorm=True))
    with pytest.raises(TypeError, match="keras_settings.*got UnitNormalization"):
        nj.convert.keras_settings(layers.UnitNormalization())
    with pytest.raises(ValueError, match="from_keras: the layer is not built.*'late'"):
        nj.convert.from_keras(layers.BatchNormalization(name="late"))
    layer = layers.BatchNormalization(renorm=True)
    layer.build((4, 2))
    with pytest.raises(ValueError, match="from_keras: 'moving_stddev' has no counterpart"):
        nj.convert.from_keras(layer)
