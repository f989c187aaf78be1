"""Percentiles of layers' inputs, and the inputs themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.diagnostics import layer_inputs, percentiles
from tests.compare import assert_close, assert_identical


@pytest.mark.slow
def test_of_layers_and_of_features(rng):
    inputs = {"conv": rng.normal(size=(7, 3, 4, 2)), "dense": [rng.normal(size=(9, 5))]}
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs)
    whole, each = percentiles(arrays), percentiles(arrays, (0, 30.5, 100), feature_axes=-1)
    for seen, q, axis in ((whole, (15, 50, 85), None), (each, (0, 30.5, 100), 0)):
        assert_close(seen.q, np.asarray(q, float), dtype=np.float32)
        conv = inputs["conv"] if axis is None else inputs["conv"].reshape(-1, 2)
        assert_close(seen.values["conv"], np.percentile(conv, q, axis), atol=1e-5)
        assert_close(seen.values["dense"][0], np.percentile(inputs["dense"][0], q, axis), atol=1e-5)


@pytest.mark.slow
def test_a_normal_distribution_has_its_deviation_at_15_and_85():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (200_000,))
    assert_close(percentiles(x).values, 3 + 2 * np.asarray([-1.0364, 0, 1.0364]), atol=0.03)


@pytest.mark.slow
def test_several_feature_axes_and_half_precision():
    x = jnp.arange(24, dtype=jnp.bfloat16).reshape(4, 2, 3)
    seen = percentiles(x, (50,), feature_axes=(1, 2)).values
    assert_close(seen, np.median(np.arange(24.0).reshape(4, 2, 3), 0)[None], dtype=np.float32)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        x = jnp.asarray([1.0, 1.0 + 1e-12])
        assert_close(percentiles(x, (100,)).values, np.asarray([1.0 + 1e-12]), dtype=np.float64)


@pytest.mark.slow
def test_a_history_from_a_scan():
    """Fields gain a leading axis of steps."""
    xs = jax.random.normal(jax.random.key(0), (6, 32, 3))
    _, history = jax.lax.scan(lambda c, x: (c, percentiles({"a": x}, feature_axes=-1)), None, xs)
    assert history.q.shape == (6, 3) and history.values["a"].shape == (6, 3, 3)
    assert_close(history.values["a"][4], np.percentile(xs[4], (15, 50, 85), 0), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (
            ({"a": jnp.ones(3)}, (50, 101)),
            {},
            "percentiles: q is out of range. Expected a finite number, 0.0 <= q",
        ),
        (({"a": jnp.ones(3)}, ()), {}, "percentiles: q is empty"),
        (
            ({"a": jnp.ones((3, 2))},),
            {"feature_axes": 2},
            "percentiles at inputs['a']: axis 2 of feature_axes",
        ),
        (({"a": jnp.arange(3)},), {}, "x.dtype=int32"),
        (
            ({"a": jnp.ones(3, jnp.complex64)},),
            {},
            "percentiles at inputs['a']: complex numbers have no order",
        ),
    ],
)
def test_refusals(arguments, settings, message):
    with pytest.raises((ValueError, TypeError)) as error:
        percentiles(*arguments, **settings)
    assert message in str(error.value)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        return nn.relu(nj.linen.BatchNorm(use_running_average=not train)(x))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        block = Block()
        x = block(x, train)
        x = block(x, train)  # once more, with the same weights
        x = nn.remat(nn.Dense, static_argnums=())(4)(x)
        return nn.Dense(3)(x)


@pytest.fixture
def linen():
    x = jax.random.normal(jax.random.key(0), (8, 4))
    return x, Linen().init(jax.random.key(1), x, train=True)


@pytest.mark.slow
def test_linen(linen):
    x, variables = linen
    (y, updates), inputs = layer_inputs(
        Linen().apply, variables, x, train=True, mutable=["batch_stats"]
    )
    expected, new = Linen().apply(variables, x, train=True, mutable=["batch_stats"])
    assert_identical((y, updates), (expected, new))
    assert list(inputs) == [
        *("Block_0", "Block_0/Dense_0", "Block_0/BatchNorm_0"),
        *("Block_0[1]", "Block_0/Dense_0[1]", "Block_0/BatchNorm_0[1]", "Dense_0"),
    ]  # and not what is within remat
    assert inputs["Block_0"] is x
    dense = variables["params"]["Block_0"]["Dense_0"]
    assert_close(
        inputs["Block_0/BatchNorm_0"], np.asarray(x @ dense["kernel"] + dense["bias"]), atol=1e-5
    )
    head = variables["params"]["Dense_0"]
    assert_close(y, np.asarray(inputs["Dense_0"] @ head["kernel"] + head["bias"]), atol=1e-5)


@pytest.mark.slow
def test_linen_in_a_jitted_gradient(linen):
    """A function may call apply; layers keep their paths, in the order of a dict's keys."""
    x, variables = linen

    def loss(params):
        (y, _), inputs = layer_inputs(
            lambda x: Linen().apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            ),
            x,
        )
        return jnp.mean(y**2), percentiles(inputs)

    _, seen = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    _, inputs = layer_inputs(Linen().apply, variables, x, train=True, mutable=["batch_stats"])
    assert sorted(seen.values) == sorted(inputs)
    assert_close(seen.values["Dense_0"], np.percentile(inputs["Dense_0"], (15, 50, 85)), atol=1e-5)


class Wide(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Wide(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.norm = nj.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


@pytest.mark.slow
def test_nnx():
    """A class that calls its parent's `__call__` is one layer; the classes are restored."""
    call, model, other = nnx.Linear.__call__, NNX(nnx.Rngs(0)), NNX(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    y, inputs = layer_inputs(model, x)
    assert list(inputs) == ["layers/0", "norm", "layers/1", "norm[1]"]
    assert_identical(y, other(x))
    assert_identical(nnx.state(model), nnx.state(other))
    assert_close(
        inputs["norm"],
        np.asarray(x @ model.layers[0].kernel[...] + model.layers[0].bias[...]),
        atol=1e-5,
    )
    assert (
        nnx.Linear.__call__ is call
        and "__call__" not in vars(nj.nnx.BatchNorm)
        or nj.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(x).shape == (8, 4)
    )
    seen = nnx.jit(lambda model, x: percentiles(layer_inputs(model, x)[1]))(other, x)
    assert_close(seen.values["layers/0"], np.percentile(x, (15, 50, 85)), atol=1e-5)


def test_nnx_classes_are_restored_when_a_call_fails():
    call, model = nnx.Linear.__call__, NNX(nnx.Rngs(0))
    with pytest.raises(TypeError):
        layer_inputs(model, jnp.ones((8, 5)))
    assert nnx.Linear.__call__ is call


@pytest.mark.slow
def test_models_whose_layers_cannot_be_seen(linen):
    x, variables = linen
    for model in (jnp.sin, jax.jit(lambda x: Linen().apply(variables, x, train=False))):
        with pytest.raises(
            TypeError, match="layer_inputs: no layer was called.*Jit around layer_inputs"
        ):
            layer_inputs(model, x)
