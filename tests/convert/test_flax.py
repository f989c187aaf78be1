"""linen's variables to nnx's states and back: models of normjax's and Flax's layers, trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.convert.training import LEARNING_RATE, TOLERANCE, batches, step

SHAPE = (6, 5, 8)
PACKAGES = {"normjax": (nj.linen, nj.nnx), "flax": (nn, nnx)}
pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


class Linen(nn.Module):
    package: object
    train: bool = True

    def setup(self):
        package = self.package
        self.conv = nn.Conv(6, (3,))
        norms = [
            package.LayerNorm(),
            package.RMSNorm(),
            package.GroupNorm(2),
            package.InstanceNorm(),
        ]
        self.norms = [package.BatchNorm(momentum=0.8, use_running_average=not self.train), *norms]
        self.bounded = package.SpectralNorm(nn.Dense(6))
        self.directed = package.WeightNorm(nn.Dense(4))
        self.attention = nn.MultiHeadDotProductAttention(2, qkv_features=4)

    def __call__(self, x):
        x = self.conv(x)
        for norm in self.norms:
            x = x + jnp.tanh(norm(x)) / 4
        x = self.directed(nn.relu(self.bounded(x, update_stats=self.train)))
        return self.attention(x)


class NNX(nnx.Module):
    def __init__(self, package, rngs):
        self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
        norms = [
            package.LayerNorm,
            package.RMSNorm,
            lambda n, rngs: package.GroupNorm(n, 2, rngs=rngs),
            package.InstanceNorm,
        ]
        batch_norm = package.BatchNorm(6, momentum=0.8, rngs=rngs)
        self.norms = nnx.List([batch_norm, *(norm(6, rngs=rngs) for norm in norms)])
        self.bounded = package.SpectralNorm(nnx.Linear(6, 6, rngs=rngs), rngs=rngs)
        self.directed = package.WeightNorm(nnx.Linear(6, 4, rngs=rngs), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, qkv_features=4, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)  # with keys and counts of random numbers

    def __call__(self, x):
        x = self.conv(x)
        for norm in self.norms:
            x = x + jnp.tanh(norm(x)) / 4
        x = self.directed(nnx.relu(self.bounded(x)))
        return self.dropout(self.attention(x))


def linen_side(model):
    @jax.jit
    def train(variables, x, weights):
        def apply(params, batch_stats, x):
            y, new = model.apply(
                {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"]
            )
            return y, new["batch_stats"]

        y, params, batch_stats = step(
            apply, variables["params"], variables["batch_stats"], x, weights
        )
        return y, {"params": params, "batch_stats": batch_stats}

    return train


@nnx.jit
def nnx_step(model, x, weights):
    def loss(model):
        y = model(x)
        return jnp.mean(jnp.resize(weights, y.size) * jnp.tanh(y.ravel())), y

    gradients, y = nnx.grad(loss, has_aux=True)(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients))
    return y


def train_both(side, variables, model, seed):
    for x, weights in batches(seed, SHAPE):
        y, variables = side(variables, x, weights)
        assert_close(nnx_step(model, jnp.asarray(x), jnp.asarray(weights)), y, **TOLERANCE)
        assert_trees_close(nj.convert.nnx_to_linen(model), variables, **TOLERANCE)
    return variables


@pytest.mark.slow
def test_training_goes_on_alike_in_both():
    linen, model = Linen(nj.linen), NNX(nj.nnx, nnx.Rngs(0))
    side = linen_side(linen)
    variables = linen.init(jax.random.key(1), jnp.zeros(SHAPE))
    for x, weights in list(batches(1, SHAPE))[:3]:
        _, variables = side(variables, x, weights)
    nnx.update(model, nj.convert.linen_to_nnx(variables, model))
    train_both(side, variables, model, seed=2)
    train_both(side, nj.convert.nnx_to_linen(model, like=variables), model, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_there_and_back_nothing_changes(package):
    of_linen, of_nnx = PACKAGES[package]
    variables = Linen(of_linen).init(jax.random.key(1), jnp.zeros(SHAPE))
    model = NNX(of_nnx, nnx.Rngs(0))
    assert variables["params"]["directed"]["layer_instance/kernel/scale"].shape == (4,)
    if package == "flax":  # whose scales of weight_norm are no variables (google/flax#5577)
        assert isinstance(model.directed.scales[("kernel",)], jax.Array)
    before = nnx.to_pure_dict(nnx.state(model, nnx.RngCount))
    nnx.update(model, nj.convert.linen_to_nnx(variables, model))
    assert_identical(nj.convert.nnx_to_linen(model), variables)
    assert_identical(nj.convert.nnx_to_linen(nnx.state(model), like=variables), variables)
    assert_identical(nnx.to_pure_dict(nnx.state(model, nnx.RngCount)), before)
    assert variables["batch_stats"]["bounded"]["layer_instance/kernel/u"].shape == (1, 6)


@pytest.mark.slow
def test_a_model_without_arrays_says_what_is_needed():
    variables = Linen(nj.linen).init(jax.random.key(1), jnp.zeros(SHAPE))
    state = nj.convert.linen_to_nnx(variables, nnx.eval_shape(lambda: NNX(nj.nnx, nnx.Rngs(0))))
    assert_identical(nj.convert.nnx_to_linen(state), variables)


@pytest.mark.slow
def test_a_scale_of_several_axes_is_flat_in_nnx():
    variables = nj.linen.RMSNorm(reduction_axes=(1, 2), feature_axes=(1, 2)).init(
        jax.random.key(0), jnp.ones(SHAPE)
    )
    variables["params"]["scale"] += jnp.arange(40.0).reshape(5, 8)
    model = nj.nnx.RMSNorm(40, reduction_axes=(1, 2), feature_axes=(1, 2), rngs=nnx.Rngs(0))
    nnx.update(model, nj.convert.linen_to_nnx(variables, model))
    assert_identical(model.scale[...], 1 + jnp.arange(40.0))
    assert_identical(nj.convert.nnx_to_linen(model, like=variables), variables)


@pytest.mark.slow
def test_metadata_of_sharding_stays_where_it_is():
    layer = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    variables = layer.init(jax.random.key(0), jnp.ones((2, 4)))
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    nnx.update(model, nj.convert.linen_to_nnx(variables, model))
    assert_identical(model.kernel[...], jnp.ones((4, 3)))


@pytest.mark.slow
def test_a_network_from_torch_goes_into_nnx():
    import torch

    network = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6))
    with torch.no_grad():
        network(torch.randn(9, 8, generator=torch.manual_seed(0)))

    class Net(nnx.Sequential):
        pass

    model = Net(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nj.nnx.BatchNorm(6, rngs=nnx.Rngs(0)))
    like = nj.convert.nnx_to_linen(model)
    state = {f"layers_{key}": value for key, value in network.state_dict().items()}
    params, batch_stats = nj.convert.from_torch(state, like=(like["params"], like["batch_stats"]))
    nnx.update(
        model, nj.convert.linen_to_nnx({"params": params, "batch_stats": batch_stats}, model)
    )
    model.eval()
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    assert_close(
        model(jnp.asarray(x)), network.eval()(torch.tensor(x)).detach().numpy(), **TOLERANCE
    )
