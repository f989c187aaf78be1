"""A scale stored as its distance from an offset, in every layer and adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.adapters import ADAPTERS, WRAPPERS
from tests.compare import assert_trees_close
from tests.contract.layers import FEATURES, SHAPE
from tests.contract.layers import LAYERS as ALL

# Not those of kernels.
LAYERS = [layer for layer in ALL if hasattr(nj, layer.name) and layer.initial_scale is not None]
CLASSES = [adapter for adapter in ADAPTERS if adapter.name not in WRAPPERS]
SCALES = {"LocalResponseNorm": {"use_scale": True}}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_a_layer_and_its_gradients_are_the_same(layer, rng):
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    weight = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    settings = layer.settings["plain"]
    params, batch_stats = layer.init(FEATURES)
    params["scale"] = jnp.asarray(rng.normal(size=FEATURES), jnp.float32)

    def loss(params, x, **offset):
        y, new = layer.apply(params, batch_stats, x, True, **settings, **offset)
        return jnp.sum(weight * y), (y, new)

    def both(params, **offset):
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x, **offset)

    stored = params | {"scale": params["scale"] - 1.5}
    assert_trees_close(both(stored, scale_offset=1.5), both(params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_the_initial_scale_follows_the_offset(layer):
    for offset in (1.0, 0.25):
        stored = layer.init(3, scale_offset=offset)[0]["scale"]
        assert (stored == layer.initial_scale - offset).all()
    twos = jax.nn.initializers.constant(2.0)
    assert (layer.init(3, scale_init=twos, scale_offset=1.0)[0]["scale"] == 2).all()


@pytest.mark.parametrize("adapter", CLASSES, ids=repr)
def test_an_adapter_starts_from_the_same_scale_and_gives_the_same(adapter, rng):
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    options = SCALES.get(adapter.name, {})
    plain, shifted = (adapter.make(**options, scale_offset=offset) for offset in (0.0, 1.0))
    np.testing.assert_array_equal(adapter.call(plain, x), adapter.call(shifted, x))
    if adapter.package == "linen":
        stored = shifted.init(jax.random.key(0), x)["params"]["scale"]
    else:
        stored = shifted.scale[...]
    initial = 0.0 if adapter.name == "GlobalResponseNorm" else 1.0
    assert (stored == initial - 1.0).all()


def test_in_bfloat16_the_digits_near_one_are_kept():
    """1.001 is not a bfloat16; 0.001 is, to three digits."""
    layer = next(layer for layer in LAYERS if layer.name == "instance_norm")
    params, _ = layer.init(1, use_bias=False, scale_offset=1.0, param_dtype=jnp.bfloat16)
    x = jnp.array([[[-1.0], [1.0]]])
    y, _ = layer.apply(
        jax.tree.map(lambda scale: scale + 0.001, params), {}, x, True, scale_offset=1.0, epsilon=0
    )
    np.testing.assert_allclose(y.ravel(), [-1.001, 1.001], rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_an_offset_that_is_not_a_number_is_refused(layer):
    params, batch_stats = layer.init(FEATURES)
    given = {**layer.settings["plain"], "scale_offset": "one"}
    with pytest.raises(TypeError, match=f"{layer.name}: scale_offset is not a number"):
        layer.apply(params, batch_stats, jnp.ones(SHAPE), True, **given)
