"""Ways to fold: forward, through pools and joins, parallel branches, ensembles, activations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.compare import widest
from tests.deploy.models import Model, drawn, linen_model

BN = partial(nj.linen.BatchNorm, use_running_average=True)
CONV = partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
POOL = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)


def assert_folds(model, variables, x, count, *others, relative=2e-6):
    """All `count` batch norms are folded, and outputs agree at the sample and at other shapes."""
    folded = nj.deploy.fold(model, variables, x, show=False)
    assert [found.reason for found in folded.found] == [None] * count
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(folded.variables)]
    assert not any("mean" in name or "var" in name for name in names)
    apply = model.apply if isinstance(model, nn.Module) else model
    for inputs in (x, *others):
        actual = widest(jax.jit(folded.apply)(folded.variables, inputs))
        expected = widest(jax.jit(apply)(variables, inputs))
        assert actual.shape == expected.shape
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < relative, error
    return folded


def crepe(x):
    """Convolution, activation, batch norm, pool: each batch norm follows an activation."""
    for features in (4, 6):
        x = POOL(BN()(nn.relu(CONV(features)(x))))
    return nn.Dense(5)(x.reshape(x.shape[0], -1))


def split(x):
    a, b, c = jnp.split(nn.Conv(9, (3, 3))(x), 3, axis=-1)
    return nn.relu(BN()(a)) * nn.relu(BN()(b)) + c


def repvgg(x, strides=1, groups=1):
    for _ in range(2):
        identity = BN()(x) if strides == 1 else 0.0
        wide = BN()(CONV(x.shape[-1], strides=strides, feature_group_count=groups)(x))
        point = BN()(
            nn.Conv(x.shape[-1], (1, 1), strides, use_bias=False, feature_group_count=groups)(x)
        )
        x = nn.relu(wide + point + identity)
    return x


WAYS = {
    "activation, pool, padded convolution, flattened dense": (crepe, 2),
    "before a dense layer": (lambda x: nn.Dense(4)(BN()(x)), 1),
    "before a padded convolution": (lambda x: nn.Conv(4, (3, 3))(BN()(x)), 1),
    "before a grouped one": (lambda x: CONV(6, feature_group_count=3)(BN()(x)), 1),
    "before a strided, dilated one": (
        lambda x: CONV(4, strides=2, kernel_dilation=(2, 2))(BN()(x)),
        1,
    ),
    "before a transposed one": (lambda x: nn.ConvTranspose(4, (3, 3), (2, 2))(BN()(x)), 1),
    "before a circular one": (lambda x: CONV(4, padding="CIRCULAR")(BN()(x)), 1),
    "before two layers": (lambda x: nn.Dense(4)(y := BN()(nn.relu(x))) + nn.Dense(4)(y), 1),
    "before the head": (lambda x: nn.Dense(4)(BN()(nn.relu(x)).mean((1, 2))), 1),
    "before explicit padding": (
        lambda x: CONV(4, padding="VALID")(
            jnp.pad(BN()(nn.relu(x)), ((0, 0), (0, 1), (0, 1), (0, 0)))
        ),
        1,
    ),
    "between two layers with a skip": (
        lambda x: (y := CONV(3)(x)) + CONV(3)(BN()(y)),
        1,
    ),
    "after a pool": (lambda x: BN()(POOL(nn.Conv(4, (3, 3))(x))), 1),
    "after a mean": (lambda x: BN()(nn.Conv(4, (3, 3))(x).mean((1, 2))), 1),
    "after an average pool": (lambda x: BN()(nn.avg_pool(CONV(4)(x), (2, 2), (2, 2))), 1),
    "after a concatenation": (
        lambda x: BN()(
            jnp.concatenate(
                [CONV(4)(x), POOL(nn.Conv(5, (3, 3))(x), strides=(1, 1), padding="SAME")], -1
            )
        ),
        1,
    ),
    "after a sum of two inputs": (lambda x: BN()(nn.Dense(4)(x) + nn.Dense(4)(nn.relu(x))), 1),
    "before a concatenation": (
        lambda x: CONV(4)(jnp.concatenate([BN()(nn.relu(x)), nn.tanh(x)], -1)),
        1,
    ),
    "two before a concatenation": (
        lambda x: CONV(4)(jnp.concatenate([BN()(nn.relu(x)), BN()(nn.tanh(x))], -1)),
        2,
    ),
    "after a split": (split, 2),
    "before a split": (
        lambda x: (
            nn.Dense(4)((parts := jnp.split(BN()(nn.relu(x)), 3, -1))[0]) * nn.Dense(4)(parts[2])
        ),
        1,
    ),
    "of both sides": (lambda x: BN()(nn.Conv(4, (3, 3))(BN()(nn.relu(x)))), 2),
    "RepVGG": (repvgg, 6),
    "RepVGG, grouped": (partial(repvgg, groups=3), 6),
    "RepVGG, strided": (partial(repvgg, strides=2), 4),
    "parallel dense": (lambda x: BN()(nn.Dense(3)(x)) + BN()(x) + nn.Dense(3)(x), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_way(way, x):
    function, count = WAYS[way]
    model, variables = linen_model(function, x)
    assert_folds(model, variables, x, count, x[:1] * 2)


@pytest.mark.slow
def test_activated_batch_norm(x):
    """The derivative that it brings is kept whole; its inference is found."""
    params, stats = drawn(nj.activated_batch_norm_init(4))
    variables = {"kernel": jnp.ones((3, 4)), "norm": params, "stats": stats}

    def network(activation, variables, x):
        y = x @ variables["kernel"]
        return nj.activated_batch_norm(
            variables["norm"], variables["stats"], y, False, activation=activation
        )[0]

    for activation in ("leaky_relu", "elu", "identity"):
        folded = assert_folds(partial(network, activation), variables, x, 1, x[:1])
        assert set(folded.variables) == {"kernel", "bias"}


def ensemble_of(function, x, count=3):
    model = Model(function)
    keys = jax.random.split(jax.random.key(0), count)
    variables = drawn(jax.jit(jax.vmap(model.init, (0, None)))(keys, x))
    return jax.vmap(model.apply, (0, None)), variables


ENSEMBLES = {
    "dense": (lambda x: nn.relu(BN()(nn.Dense(4)(x))), 1),
    "convolutions": (
        lambda x: BN()(CONV(5)(nn.relu(BN()(nn.Conv(4, (3, 3))(x))))),
        2,
    ),
    "grouped": (lambda x: BN()(CONV(6, feature_group_count=3)(x)), 1),
    "forward": (crepe, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensembles(name, x):
    function, count = ENSEMBLES[name]
    apply, variables = ensemble_of(function, x)
    folded = assert_folds(apply, variables, x, count, x[:1])
    for path, leaf in jax.tree.leaves_with_path(folded.variables):
        assert leaf.shape[0] == 3 or path[-1].key == "padding"


def test_a_negative_scale_turns_a_maximum_into_a_minimum(x):
    def pooled(x):
        return CONV(2)(POOL(BN()(nn.relu(x))))

    model, variables = linen_model(pooled, x)
    scale = variables["params"]["BatchNorm_0"]["scale"]
    variables["params"]["BatchNorm_0"]["scale"] = scale.at[1].set(-1)
    folded = nj.deploy.fold(model, variables, x, show=False)
    assert folded.found[0].kernel is None and "its scale is negative" in folded.found[0].reason
    np.testing.assert_array_equal(folded.apply(variables, x), jax.jit(model.apply)(variables, x))


@pytest.mark.parametrize("zero", [0, 1e-36])
def test_a_scale_of_zero_sends_nothing_to_the_zeros_of_a_border(zero, x):
    model, variables = linen_model(lambda x: CONV(2)(BN()(nn.relu(x))), x)
    scale = variables["params"]["BatchNorm_0"]["scale"]
    variables["params"]["BatchNorm_0"]["scale"] = scale.at[1].set(zero)
    folded = nj.deploy.fold(model, variables, x, show=False)
    assert folded.found[0].kernel is None
    assert "its scale at feature 1 is" in folded.found[0].reason


def test_parallel_branches_become_one_convolution(x):
    """RepVGG's block: 3x3, 1x1 and identity, each with a batch norm."""
    model, variables = linen_model(repvgg, x)
    folded = assert_folds(model, variables, x, 6)
    program = str(jax.make_jaxpr(folded.apply)(folded.variables, x))
    assert program.count("conv_general_dilated[") == 2
    assert jax.tree.map(jnp.shape, folded.variables) == {
        "params": {
            "Conv_0": {"kernel": (3, 3, 3, 3), "bias": (3,)},
            "Conv_2": {"kernel": (3, 3, 3, 3), "bias": (3,)},
        }
    }
    assert {found.kernel for found in folded.found} == {
        "params/Conv_0/kernel",
        "params/Conv_2/kernel",
    }


def test_the_border_of_a_convolution_is_a_leaf(x):
    """CREPE's layers: the border is what the batch norm would have sent to zero."""
    model, variables = linen_model(crepe, x)
    folded = assert_folds(model, variables, x, 2)
    params, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    scale = params["BatchNorm_0"]["scale"] / jnp.sqrt(stats["var"] + 1e-5)
    border = stats["mean"] - params["BatchNorm_0"]["bias"] / scale
    np.testing.assert_allclose(folded.variables["params"]["Conv_1"]["padding"], border, rtol=1e-5)
    assert [found.kernel for found in folded.found] == [
        "params/Conv_1/kernel",
        "params/Dense_0/kernel",
    ]


@pytest.mark.slow
# qwix 0.1.8 asks for it
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
def test_a_module_for_qwix(x):
    """A network with a border of its own, a dense kernel and nnx's paths goes to int8."""
    import qwix

    class Small(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.next = (nnx.Conv(3, 3, (3, 3), rngs=rngs) for _ in range(2))
            self.norm, self.head = nj.nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 5, rngs=rngs)

        def __call__(self, x):
            x = self.next(self.norm(nnx.relu(self.conv(x))))
            return self.head(nnx.relu(x).mean((1, 2)))

    model = Small(nnx.Rngs(0))
    nnx.update(model, drawn(nnx.state(model)))
    folded = nj.deploy.fold(model, nnx.state(model), x, show=False)
    assert folded.found == (nj.deploy.Found("norm", "next/kernel"),)
    module, variables = folded.as_linen()
    assert jax.tree.map(jnp.shape, variables["params"]["next"]) == {
        "kernel": (3, 3, 3, 3),
        "bias": (3,),
        "padding": (3,),
    }
    expected = folded.apply(folded.variables, x)
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        module.apply(variables, x[:1, :6]), folded.apply(folded.variables, x[:1, :6]), rtol=1e-5
    )
    made = module.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)

    rules = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    quantized = qwix.quantize_model(module, qwix.PtqProvider(rules))
    wanted = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    params = qwix.quantize_params(variables["params"], wanted)
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8]
    assert sorted(kernels) == [(3, 3, 3, 3), (3, 3, 3, 3), (3, 5)]
    actual = jax.jit(quantized.apply)({"params": params}, x)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.05


@pytest.mark.slow
def test_pairs_that_are_named(x):
    """A part of what can be folded: forward, and one of two blocks of parallel branches."""
    model, variables = linen_model(crepe, x)
    pair = ("params/Dense_0/kernel", "batch_stats/BatchNorm_1")
    folded = nj.deploy.fold(model, variables, x, pairs=[pair], show=False)
    assert [found.kernel for found in folded.found] == [None, "params/Dense_0/kernel"]
    assert list(folded.variables["batch_stats"]) == ["BatchNorm_0"]
    np.testing.assert_allclose(
        folded.apply(folded.variables, x), model.apply(variables, x), rtol=1e-4
    )
    model, variables = linen_model(repvgg, x)
    whole = nj.deploy.fold(model, variables, x, show=False)
    named = [(each.kernel, each.norm) for each in whole.found[:3]]
    folded = nj.deploy.fold(model, variables, x, pairs=named, show=False)
    assert sorted(folded.variables["params"]) == [
        *(f"BatchNorm_{i}" for i in (3, 4, 5)),
        *("Conv_0", "Conv_2", "Conv_3"),
    ]


@pytest.mark.slow
def test_half_precision(x):
    def layers(x):
        conv = partial(nn.Conv, kernel_size=(3, 3), dtype=jnp.bfloat16)
        norm = partial(BN, dtype=jnp.bfloat16)
        parts = jnp.concatenate([conv(4)(x), conv(5)(x)], -1)
        return conv(3)(norm()(nn.relu(norm()(parts))))

    assert_folds(*linen_model(layers, x), x, 2, relative=0.02)


@pytest.mark.slow
def test_flax_own_layers_of_nnx(x):
    """Forward and parallel, in an nnx module with Flax's batch norm."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.first, self.wide, self.identity = (
                nnx.BatchNorm(3, use_running_average=True, rngs=rngs) for _ in range(3)
            )
            self.conv = nnx.Conv(3, 3, (3, 3), use_bias=False, rngs=rngs)
            self.head = nnx.Conv(3, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.wide(self.conv(x)) + self.identity(x))
            return self.head(self.first(x))

    model = Block(nnx.Rngs(0))
    nnx.update(model, drawn(nnx.state(model)))
    folded = nj.deploy.fold(model, nnx.state(model), x, show=False)
    assert {(found.norm, found.kernel) for found in folded.found} == {
        ("first", "head/kernel"),
        ("wide", "conv/kernel"),
        ("identity", "conv/kernel"),
    }
    assert folded.error < 1e-6
    model.eval()
    np.testing.assert_allclose(
        folded.apply(folded.variables, x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5
    )
