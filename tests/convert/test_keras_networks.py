"""Keras' layers of several kernels against Flax's of the same meaning, and models of models."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import linen as nn
from keras import layers

import normjax as nj
from tests.compare import assert_close, assert_identical
from tests.convert.training import EPS

TOLERANCE = {"rtol": 100 * EPS, "atol": 100 * EPS}
pytestmark = [
    pytest.mark.usefixtures("promotion_as_in_flax"),  # Keras, too, mixes dtypes
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
SEQUENCE, IMAGES = (2, 5, 6), (2, 8, 8, 6)


class Separable(nn.Module):
    multiplier: int

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        x = nn.Conv(
            features * self.multiplier,
            (3, 3),
            padding="VALID",
            feature_group_count=features,
            use_bias=False,
            name="depthwise",
        )(x)
        return nn.Conv(4, (1, 1), name="pointwise")(x)


def cell(name, kind):
    return lambda params, x: nn.RNN(kind(3)).apply({"params": {"cell": params[name]}}, x)


def module(flax):
    return lambda params, x: flax.apply({"params": params}, x)


def attention(params, x):
    return nn.MultiHeadDotProductAttention(2, qkv_features=8).apply({"params": params}, x)


# The layer of Keras, the shape of x, and what Flax computes with the converted weights.
CASES = {
    "LSTM": (
        lambda: layers.LSTM(3, return_sequences=True),
        SEQUENCE,
        cell("lstm_cell", nn.OptimizedLSTMCell),
    ),
    "LSTM without bias": (
        lambda: layers.LSTM(3, return_sequences=True, use_bias=False),
        SEQUENCE,
        cell("lstm_cell", nn.LSTMCell),
    ),
    "GRU": (lambda: layers.GRU(3, return_sequences=True), SEQUENCE, cell("gru_cell", nn.GRUCell)),
    "SimpleRNN": (
        lambda: layers.SimpleRNN(3, return_sequences=True),
        SEQUENCE,
        cell("simple_rnn_cell", nn.SimpleCell),
    ),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(4, 3, depth_multiplier=2),
        IMAGES,
        module(Separable(2)),
    ),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        IMAGES,
        module(nn.Conv(12, (3, 3), padding="VALID", feature_group_count=6)),
    ),
    "DepthwiseConv1D": (
        lambda: layers.DepthwiseConv1D(3),
        SEQUENCE,
        module(nn.Conv(6, (3,), padding="VALID", feature_group_count=6)),
    ),
    "grouped Conv2D": (
        lambda: layers.Conv2D(4, 3, groups=2),
        IMAGES,
        module(nn.Conv(4, (3, 3), padding="VALID", feature_group_count=2)),
    ),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 4), SEQUENCE, attention),
    "PReLU": (
        layers.PReLU,
        SEQUENCE,
        lambda params, x: jnp.where(x > 0, x, params["alpha"] * x),
    ),
}


def built(name):
    """Returns a layer with random weights, its output, and the arguments that it takes."""
    make, shape, _ = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    layer = make()
    arguments = (x, x) if name == "MultiHeadAttention" else (x,)
    layer(*arguments)
    layer.set_weights([rng.normal(size=w.shape).astype(np.float32) for w in layer.get_weights()])
    return layer, layer(*arguments), arguments


@pytest.mark.parametrize("name", CASES)
def test_flax_computes_the_same_and_the_weights_go_back(name):
    layer, y, (x, *_) = built(name)
    params, batch_stats = nj.convert.from_keras(layer)
    assert batch_stats == {}
    assert_close(CASES[name][2](params, jnp.asarray(x)), y, **TOLERANCE)

    back = nj.convert.to_keras(params, {}, like=layer)
    if name == "GRU":  # Flax has the sum of two biases, so only what is computed comes back
        layer.set_weights(list(back.values()))
        assert_close(layer(x), y, **TOLERANCE)
    else:
        assert_identical(list(back.values()), layer.get_weights())


def test_without_like_the_weights_have_the_names_of_keras():
    shared = ("LSTM", "GRU", "SimpleRNN", "MultiHeadAttention", "PReLU")
    separable = layers.SeparableConv2D(4, 3)  # the depth multiplier is taken for 1
    separable.build(IMAGES)
    for layer in (*(built(name)[0] for name in shared), separable):
        back = nj.convert.to_keras(*nj.convert.from_keras(layer))
        assert {key: value.shape for key, value in back.items()} == {
            weight.path.removeprefix(f"{layer.name}/"): tuple(weight.shape)
            for weight in layer.weights
        }


def test_a_mapping_gives_what_the_layer_gives():
    for name in ("LSTM", "SeparableConv2D", "MultiHeadAttention", "DepthwiseConv2D"):
        layer, *_ = built(name)
        weights = {w.path.removeprefix(f"{layer.name}/"): np.asarray(w) for w in layer.weights}
        expected = nj.convert.from_keras(layer)
        assert_identical(nj.convert.from_keras(weights, like=expected), expected)


def test_normalization_is_batch_norm_without_parameters():
    layer = layers.Normalization()
    x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    x[:, 3] = 5  # a variance of 0, which Keras bounds
    layer.adapt(x)
    params, batch_stats = nj.convert.from_keras(layer)
    assert params == {} and batch_stats["count"].dtype == jnp.int32
    settings = nj.convert.keras_settings(layer)
    y, _ = nj.batch_norm({}, batch_stats, jnp.asarray(x), train=False, **settings)
    assert_close(y, layer(x), **TOLERANCE)
    back = nj.convert.to_keras({}, batch_stats, like=layer)
    assert_identical(list(back.values()), layer.get_weights())
    del batch_stats["count"]
    back = nj.convert.to_keras({}, batch_stats, like=layer)
    assert_identical(list(back.values()), layer.get_weights())
    with pytest.raises(ValueError, match="keras_settings: .*invert=True"):
        nj.convert.keras_settings(layers.Normalization(invert=True, mean=0.0, variance=1.0))


def test_a_gru_that_resets_first_is_handed_through():
    layer = layers.GRU(3, reset_after=False, use_bias=False)
    layer.build(SEQUENCE)
    params, _ = nj.convert.from_keras(layer)
    assert {*params["gru_cell"]} == {"kernel", "recurrent_kernel"}
    back = nj.convert.to_keras(params, {}, like=layer)
    assert_identical(list(back.values()), layer.get_weights())
    with pytest.raises(ValueError, match="'gru_cell/kernel' has no.*'gru_cell/recurrent_kernel'"):
        nj.convert.from_keras(layer, others="refuse")


def tower(name, mean):
    """A model with layers of the same names as its siblings."""
    image = keras.Input((8, 8, 3))
    norm = layers.BatchNormalization(name="bn")
    model = keras.Model(image, norm(layers.Conv2D(4, 3, name="conv")(image)), name=name)
    norm.moving_mean.assign(np.full(4, mean, np.float32))
    return model


@pytest.mark.parametrize("wrap", [lambda layer: layer, layers.TimeDistributed])
def test_layers_of_equal_names_in_two_models_are_kept_apart(wrap):
    image = keras.Input((8, 8, 3) if wrap is not layers.TimeDistributed else (2, 8, 8, 3))
    model = keras.Model(image, [wrap(tower("a", 1.0))(image), wrap(tower("b", 9.0))(image)])
    params, batch_stats = nj.convert.from_keras(model)
    assert len(jax.tree.leaves((params, batch_stats))) == len(model.weights) == 12
    found = [path for path, _ in jax.tree.leaves_with_path(batch_stats) if path[-1].key == "mean"]
    assert sorted(path[-3].key for path in found) == ["a", "b"]
    means = [leaf for leaf in jax.tree.leaves(batch_stats) if float(leaf[0]) in (1, 9)]
    assert sorted(float(leaf[0]) for leaf in means if leaf[0] == 9) == [9.0]
    back = nj.convert.to_keras(params, batch_stats, like=model)
    assert_identical(list(back.values()), model.get_weights())


def test_two_layers_of_one_name_in_one_model_are_refused():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__(name="twins")
            self.first = layers.Dense(3, name="dense", use_bias=False)
            self.second = layers.Dense(3, name="dense", use_bias=False)

        def call(self, x):
            return self.second(self.first(x))

    model = Twins()
    model(np.ones((2, 3), np.float32))
    message = (
        r"from_keras: two arrays would be stored at 'dense/kernel'.*weight 0 of twins, "
        r"twins/dense/kernel.*and 'weight 1 of twins"
    )
    with pytest.raises(ValueError, match=message):
        nj.convert.from_keras(model)


def test_a_shared_layer_is_at_its_first_place():
    shared = layers.Dense(3, name="shared")
    a, b = (keras.Sequential([keras.Input((3,)), shared], name=name) for name in "ab")
    x = keras.Input((3,))
    model = keras.Model(x, b(a(x)))
    params, _ = nj.convert.from_keras(model)
    assert params["a"]["shared"]["kernel"].shape == (3, 3) and "b" not in params
    back = nj.convert.to_keras(params, {}, like=model)
    assert_identical(list(back.values()), model.get_weights())


@keras.saving.register_keras_serializable()
class WithTokens(layers.Layer):
    """A layer with weights of its own, of which one is not trained."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")
        self.index = self.add_weight(
            shape=(4,), dtype="int32", name="index", trainable=False, initializer="zeros"
        )

    def call(self, x):
        return x + self.token


def test_what_no_known_layer_has_is_handed_through_or_refused_at_once():
    image = keras.Input((5, 6))
    x = layers.PReLU(name="slopes")(WithTokens(name="tokens")(image))
    model = keras.Model(image, layers.Dense(2, name="head")(x))
    params, batch_stats = nj.convert.from_keras(model)
    assert params["tokens"]["token"].shape == (1, 1, 6) and params["slopes"]["alpha"].shape == (
        5,
        6,
    )
    assert batch_stats["tokens"]["index"].dtype == jnp.int32
    back = nj.convert.to_keras(params, batch_stats, like=model)
    assert_identical(list(back.values()), model.get_weights())
    message = "'tokens/token' has .*, the first of 3.*'tokens/index' of .*'slopes/alpha' of"
    with pytest.raises(ValueError, match=f"from_keras: {message}.*others=.keep"):
        nj.convert.from_keras(model, others="refuse")
    message = "'params/tokens/token' has no .*, the first of 3.*'batch_stats/tokens/index' of"
    with pytest.raises(ValueError, match=f"to_keras: {message}"):
        nj.convert.to_keras(params, batch_stats, others="refuse")


def test_leaves_of_one_name_are_refused_on_both_ways():
    ones = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="stored at 'params/bn/scale'.*'bn/gamma' and 'bn/scale'"):
        nj.convert.from_keras({"bn/gamma": ones, "bn/scale": ones})
    with pytest.raises(ValueError, match="stored at 'params/a'.*'a' and 'a/bias'"):
        nj.convert.from_keras({"a": ones, "a/bias": ones})
    params = {"a": {"bn": {"scale": ones}}, "a/bn": {"scale": ones}}
    message = "stored at 'a/bn/gamma'.*'params/a/bn/scale' and 'params/a/bn/scale'"
    with pytest.raises(ValueError, match=f"to_keras: .*{message}"):
        nj.convert.to_keras(params, {})


# The networks of keras.applications that the converter did not take before: a separable
# convolution, data normalization, and a layer scale. The others only differ in size.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["EfficientNetB0", "Xception", "ConvNeXtTiny"])
def test_networks_go_there_and_back(name):
    model = getattr(keras.applications, name)(weights=None)
    params, batch_stats = nj.convert.from_keras(model)
    back = nj.convert.to_keras(params, batch_stats, like=model)
    assert_identical(list(back.values()), model.get_weights())
