"""Whole models, folded: what they compute, what is left of them, and what runs them."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.compare import assert_close, assert_identical, widest
from tests.deploy.models import Model, ResNet, drawn, linen_model

BN = partial(nj.linen.BatchNorm, use_running_average=True)
FLAX = partial(nn.BatchNorm, use_running_average=True)
RELATIVE = 1e-5

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)


def assert_agrees(actual, expected, relative=RELATIVE):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.linalg.norm(widest(actual) - widest(expected)) < relative * np.linalg.norm(
        widest(expected)
    )


def assert_folds(model, variables, x, count, relative=RELATIVE):
    """Asserts that all `count` batch norms are folded without a trace, and that outputs agree."""
    folded = nj.deploy.fold(model, variables, x, show=False)
    assert [found.reason for found in folded.found] == [None] * count
    kept = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(folded.variables)}
    assert not any("mean" in path or "var" in path or "scale" in path for path in kept)
    assert not re.search(
        r"\b(rsqrt|sub|sqrt)\b", str(jax.make_jaxpr(folded.apply)(folded.variables, x))
    )
    apply = model.apply if isinstance(model, nn.Module) else model

    def both(kept, variables, inputs):
        return folded.apply(kept, inputs), apply(variables, inputs)

    run = jax.jit(both)
    for inputs in (x, jnp.concatenate([x, -x])[:, ::-1]):
        assert_agrees(*run(folded.variables, variables, inputs), relative)
    return folded


LAYERS = {
    "conv": lambda x: BN()(nn.Conv(4, (3, 3))(x)),
    "conv of flax's norm": lambda x: FLAX()(nn.Conv(4, (3, 3), use_bias=False)(x)),
    "one dimension, several batch axes": lambda x: BN()(nn.Conv(4, (3,))(x)),
    "no batch axis": lambda x: jnp.stack([BN()(nn.Conv(4, (3, 3))(x[0]))]),
    "grouped": lambda x: BN()(nn.Conv(6, (3, 3), feature_group_count=3)(x)),
    "circular": lambda x: BN()(nn.Conv(4, (3, 3), padding="CIRCULAR")(x)),
    "unshared": lambda x: BN()(nn.ConvLocal(4, (2, 2))(x)),
    "transposed": lambda x: BN()(nn.ConvTranspose(4, (3, 3), (2, 2))(x)),
    "transposed kernel": lambda x: BN()(
        nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True)(x)
    ),
    "dense": lambda x: BN()(nn.Dense(4)(x)),
    "dense of two features": lambda x: BN(axis=(-2, -1))(nn.DenseGeneral((2, 3))(x)),
    "dense, one of two features": lambda x: BN()(nn.DenseGeneral((2, 3))(x)),
    "einsum": lambda x: BN()(nn.Einsum((3, 4), "bhwi,io->bohw")(x).transpose(0, 2, 3, 1)),
    "no scale, no bias": lambda x: BN(use_scale=False, use_bias=False)(
        nn.Dense(4, use_bias=False)(x)
    ),
    "renorm": lambda x: nj.linen.BatchRenorm(use_running_average=True)(nn.Dense(4)(x)),
    "layout between": lambda x: BN(axis=1)(
        nn.Conv(4, (3, 3))(x).transpose(0, 3, 1, 2).reshape(-1, 4, 36)
    ),
    "dropout between": lambda x: BN()(nn.Dropout(0.5, deterministic=True)(nn.Dense(4)(x))),
    "used twice after": lambda x: nn.gelu(BN()(nn.Dense(4)(x))),
    "rematerialized": lambda x: nn.remat(Model)(lambda x: BN()(nn.Dense(4)(x)))(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_linen(name, x):
    assert_folds(*linen_model(LAYERS[name], x), x, 1)


@pytest.mark.slow
def test_one_after_the_other(x):
    assert_folds(*linen_model(lambda x: nn.relu(BN()(BN()(nn.Dense(4)(x)))), x), x, 2)


@pytest.mark.slow
def test_one_batch_norm_after_two_layers(x):
    def layers(x):
        norm = BN()
        return norm(nn.Dense(4)(nn.relu(norm(nn.Dense(4)(x)))))

    assert_folds(*linen_model(layers, x), x, 2)


def by_hand(variables, x):
    """Kernel first, Keras's epsilon, and a formula of its own."""
    norm = variables[1]
    y = variables[0][0] @ x.reshape(-1, 3).T
    return (
        -(norm["mean"][:, None] - y)
        / jnp.sqrt(norm["var"] + 1e-3)[:, None]
        * jnp.exp(norm["log_scale"])[:, None]
    )


@pytest.mark.slow
def test_functions_of_any_tree(rng, x):
    norm = {
        "mean": rng.normal(size=4),
        "var": rng.uniform(0.5, 2, 4),
        "log_scale": rng.normal(size=4),
    }
    kernel = rng.normal(size=(4, 3))
    folded = assert_folds_by_hand(
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), ([kernel], norm)), x
    )
    assert jax.tree.map(jnp.shape, folded.variables) == {"0": {"0": (4, 3), "0_bias": (4,)}}


def assert_folds_by_hand(variables, x):
    folded = nj.deploy.fold(by_hand, variables, x, show=False)
    assert folded.found == (nj.deploy.Found("1", "0/0"),)
    assert_agrees(folded.apply(folded.variables, x), by_hand(variables, x))
    return folded


def test_a_functional_network(x):
    norm, batch_stats = drawn(nj.batch_norm_init(5))

    def network(variables, x):
        y, _ = nj.batch_norm(
            variables["params"]["norm"], variables["batch_stats"], x @ variables["kernel"], False
        )
        return jax.nn.relu(y)

    variables = {"params": {"norm": norm}, "batch_stats": batch_stats, "kernel": jnp.ones((3, 5))}
    folded = assert_folds(network, variables, x, 1)
    assert jax.tree.map(jnp.shape, folded.variables) == {"kernel": (3, 5), "bias": (5,)}


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nj.nnx.BatchNorm, nnx.BatchNorm], ids=["normjax", "flax"])
def test_a_resnet_of_nnx(norm, x):
    model = ResNet(norm, nnx.Rngs(0))  # in training mode, in which it stays
    nnx.update(model, drawn(nnx.state(model)))
    folded = nj.deploy.fold(model, nnx.state(model), x, show=False)
    assert len(folded.found) == 6 and not any(found.reason for found in folded.found)
    assert folded.found[0] == nj.deploy.Found("stem_norm", "stem/kernel")
    assert not model.stem_norm.use_running_average
    model.eval()
    assert_agrees(folded.apply(folded.variables, x), nnx.jit(ResNet.__call__)(model, x))


@pytest.mark.slow
def test_a_resnet_of_linen(rng, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from train_resnet.resnet import ResNet as LinenResNet

    model = LinenResNet("resnet18", 8, 10, dtype=jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = drawn(model.init(jax.random.key(0), x, train=False))
    assert_folds(partial(model.apply, train=False), variables, x, 20)


@pytest.mark.slow
def test_half_precision_rounds_once(x):
    model, variables = linen_model(
        lambda x: BN(dtype=jnp.bfloat16)(nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x)), x
    )
    folded = assert_folds(model, variables, x, 1, 0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded.variables)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_the_variables_are_those_of_the_model_without_its_norms(x):
    """So that what works on modules, as quantizers do, has one."""
    model, variables = linen_model(
        lambda x: nn.Dense(2)(nn.relu(BN()(nn.Conv(4, (3, 3), use_bias=False)(x)))), x
    )
    plain = Model(lambda x: nn.Dense(2)(nn.relu(nn.Conv(4, (3, 3))(x))))
    folded = nj.deploy.fold(model, variables, x, show=False)
    assert_close(plain.apply(folded.variables, x), folded.apply(folded.variables, x), atol=1e-6)


def two(x):
    return BN(name="norm2")(
        nn.Dense(3, name="dense2")(nn.relu(BN(name="norm1")(nn.Dense(5, name="dense1")(x))))
    )


@pytest.mark.slow
def test_pairs_that_are_named(x):
    model, variables = linen_model(two, x)
    first = "params/dense1/kernel", "batch_stats/norm1"
    folded = nj.deploy.fold(model, variables, x, pairs=[first], show=False)
    assert folded.found == (
        nj.deploy.Found("batch_stats/norm1", "params/dense1/kernel"),
        nj.deploy.Found("batch_stats/norm2", None, "not named"),
    )
    assert_identical(folded.variables["batch_stats"], {"norm2": variables["batch_stats"]["norm2"]})
    assert_identical(folded.variables["params"]["dense2"], variables["params"]["dense2"])
    assert_agrees(folded.apply(folded.variables, x), model.apply(variables, x))


@pytest.mark.slow
def test_a_table_is_printed(x, capsys):
    nj.deploy.fold(*linen_model(lambda x: nn.Dense(2)(BN()(two(x) + 1)), x), x)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["batch_stats/norm1", "params/dense1/kernel"],
        ["batch_stats/norm2", "params/dense2/kernel"],
        ["batch_stats/BatchNorm_0", "params/dense2/kernel"],
    ]
    assert all(line.endswith("folded") for line in lines[1:4])
    assert re.fullmatch(r"3 of 3 folded; outputs agree to \d\.\de-0[678]", lines[4])


@pytest.mark.slow
def test_the_folded_model_is_a_function_like_any_other(x):
    model, variables = linen_model(two, x)
    folded = nj.deploy.fold(model, variables, x, show=False)

    def loss(apply, variables, x):
        return (apply(variables, x) ** 2).sum()

    assert_close(
        jax.vmap(folded.apply, (None, 0))(folded.variables, x), model.apply(variables, x), atol=1e-5
    )
    actual, expected = (
        jax.grad(partial(loss, apply), argnums=1)(own, x)
        for apply, own in ((folded.apply, folded.variables), (model.apply, variables))
    )
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(
        jax.grad(partial(loss, folded.apply))(folded.variables, x)
    ) == jax.tree.structure(folded.variables)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), folded.variables)
    assert_close(folded.apply(half, x.astype(jnp.bfloat16)), model.apply(variables, x), atol=0.1)


@pytest.mark.slow
def test_shapes_are_traced_once(x):
    count = 0

    def layers(x):
        nonlocal count
        count += 1
        return two(x)

    model, variables = linen_model(layers, x)
    folded = nj.deploy.fold(model, variables, x, show=False)
    count = 0
    for _ in range(3):
        folded.apply(folded.variables, x[:3])
    assert count == 1
