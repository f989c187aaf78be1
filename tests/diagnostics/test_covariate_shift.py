"""Definition 2.1 of Santurkar et al., written out layer by layer and in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.diagnostics import internal_covariate_shift
from tests.compare import assert_close, assert_identical, assert_trees_close

DEPTH = 3


def matrices(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(4, 4)) for _ in range(DEPTH)]


def tree(kernels):
    return {f"layer_{i}": {"kernel": jnp.asarray(kernel)} for i, kernel in enumerate(kernels)}


def batch():
    rng = np.random.default_rng(7)
    return rng.normal(size=(6, 4)), rng.normal(size=(6, 4))


def loss(params):
    x, y = map(jnp.asarray, batch())
    for i in range(DEPTH):
        x = x @ params[f"layer_{i}"]["kernel"]
    return 0.5 * jnp.sum((x - y) ** 2)


def gradient(kernels, i):
    """Of the deep linear network, with respect to kernel i, by hand."""
    x, y = batch()
    before = x
    for kernel in kernels[:i]:
        before = before @ kernel
    after = np.eye(4)
    for kernel in kernels[i + 1 :]:
        after = after @ kernel
    return before.T @ (before @ kernels[i] @ after - y) @ after.T


@pytest.mark.slow
def test_a_deep_linear_network():
    old, new = matrices(0), matrices(1)
    with jax.enable_x64(True):
        shift = internal_covariate_shift(
            loss, tree(old), tree(new), layers=[f"layer_{i}" for i in range(DEPTH)]
        )
    for i in range(DEPTH):
        before, after = gradient(old, i), gradient(new[:i] + old[i:], i)
        assert_close(shift.distance[i], np.linalg.norm(before - after), rtol=1e-10, atol=1e-12)
        cosine = (before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after)
        assert_close(shift.cosine[i], cosine, rtol=1e-10)
        assert_close(shift.gradient_norm[i], np.linalg.norm(before), rtol=1e-10)
    assert float(shift.distance[0]) == 0 and (np.asarray(shift.distance[1:]) > 1).all()


@pytest.mark.slow
def test_layers_go_in_the_order_that_is_given():
    old, new = matrices(0), matrices(1)
    with jax.enable_x64(True):
        shift = internal_covariate_shift(
            loss, tree(old), tree(new), layers=["layer_2", "layer_0", "layer_1"]
        )
    mixed = [old[0], old[1], new[2]]
    assert_close(
        shift.distance[1], np.linalg.norm(gradient(old, 0) - gradient(mixed, 0)), rtol=1e-10
    )
    assert float(shift.distance[0]) == 0


@pytest.mark.slow
def test_without_an_update_there_is_no_shift():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree(matrices(0)))
    with jax.numpy_dtype_promotion("standard"):
        shift = internal_covariate_shift(loss, params, params, layers=list(params))
    assert_close(shift.distance, np.zeros(DEPTH))
    assert_close(shift.cosine, np.ones(DEPTH), atol=1e-6)


@pytest.mark.slow
def test_gradients_that_are_zero():
    """A layer that the loss does not depend on, before or after."""
    params = {"a": jnp.float32(0.0), "b": jnp.float32(1.0), "c": jnp.float32(1.0)}
    updated = {"a": jnp.float32(1.0), "b": jnp.float32(1.0), "c": jnp.float32(1.0)}

    def loss(params):
        return params["a"] * params["b"] + 0 * params["c"]

    shift = internal_covariate_shift(loss, params, updated, layers=("a", "b", "c"))
    assert_close(shift.distance, np.asarray([0.0, 1.0, 0.0]))
    assert_close(shift.cosine, np.asarray([1.0, 0.0, 1.0]))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nj.linen.BatchNorm(use_running_average=False)(nn.Dense(8, use_bias=False)(x)))
        return nn.Dense(3)(x)


@pytest.mark.slow
def test_a_linen_model_in_a_jitted_step():
    """A dense layer and its normalization are one layer: both are updated at once."""
    x = jax.random.normal(jax.random.key(0), (16, 5))
    variables = Network().init(jax.random.key(1), x)
    layers = (("Dense_0", "BatchNorm_0"), "Dense_1")

    def loss(params):
        y, _ = Network().apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.mean(y**2)

    @jax.jit
    def step(params):
        updated = jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params))
        return updated, internal_covariate_shift(loss, params, updated, layers=layers)

    params = variables["params"]
    updated, shift = step(params)
    partly = updated | {"Dense_1": params["Dense_1"]}
    before, after = (jax.grad(loss)(tree)["Dense_1"] for tree in (params, partly))
    expected = np.sqrt(sum(np.sum(np.square(before[leaf] - after[leaf])) for leaf in before))
    assert_close(shift.distance, np.asarray([0.0, expected]), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_nnx_modules_stay_as_they_are():
    """As the tree of their parameters does; new statistics are left out."""
    x = jax.random.normal(jax.random.key(0), (16, 5))
    layers = (("layers/0", "layers/1"), "layers/2")

    def network(seed):
        rngs = nnx.Rngs(seed)
        norm = nj.nnx.BatchNorm(4, rngs=rngs)
        return nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), norm, nnx.Linear(4, 3, rngs=rngs))

    def loss(model):
        return jnp.mean(model(x) ** 2)

    old, new = network(0), network(1)
    before = jax.tree.map(jnp.copy, nnx.state(old))
    shift = internal_covariate_shift(loss, old, new, layers=layers)
    assert_identical(nnx.state(old), before)
    graphdef, params, others = nnx.split(old, nnx.Param, ...)
    expected = internal_covariate_shift(
        lambda params: loss(nnx.merge(graphdef, params, others, copy=True)),
        params,
        nnx.state(new, nnx.Param),
        layers=layers,
    )
    assert_trees_close(shift, expected, rtol=1e-5, atol=1e-6)
    assert float(shift.distance[1]) > 0.01


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("layer_0", "layer_1"), "'layer_2/kernel' is in 0 layers"),
        (("layer_0", "layer_1", "layer_2", "layer_3"), "'layer_3' of layers is not in params"),
        (("layer_0", "layer_1", ("layer_2", "layer_2/kernel")), "'layer_2/kernel' is in 2 layers"),
        (("layer_0", "layer_1", "layer_2", "layer_0"), "'layer_0/kernel' is in 2 layers"),
        ("layer_0", "'l' of layers is not in params"),
    ],
)
def test_layers_that_do_not_fit(layers, message):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree(matrices(0)))
    with pytest.raises(ValueError) as error, jax.numpy_dtype_promotion("standard"):
        internal_covariate_shift(loss, params, params, layers=layers)
    assert message in str(error.value) and str(error.value).startswith("internal_covariate_shift: ")


def test_trees_that_do_not_fit():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree(matrices(0)))
    with (
        pytest.raises(ValueError, match="which updated lacks"),
        jax.numpy_dtype_promotion("standard"),
    ):
        internal_covariate_shift(loss, params, {"layer_0": params["layer_0"]}, layers=list(params))
