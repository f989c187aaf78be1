"""Training steps that differ in nothing but their normalization layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from benchmarks.harness import bit, networks, training, transformers
from tests.compare import assert_close

READ = {network.name: network for network in networks.suite("gpu_static")}

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
TINY = {network.name: network for network in networks.suite("tiny")}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_layers_are_the_peers_and_nothing_else_changes(name):
    network = TINY[name]
    inputs, labels = networks.batch(network)
    states, traced = {}, {}
    for peer in ("normjax", "flax.linen", "none"):
        with networks.normalized_by(peer):
            states[peer] = jax.eval_shape(network.init, jax.random.key(0), inputs)
            traced[peer] = str(
                jax.make_jaxpr(networks.step(network))(*states[peer], inputs, labels)
            )
    assert states["normjax"] == states["flax.linen"] == states["none"]
    for operation in ("conv_general_dilated", "dot_general"):
        assert len({text.count(f"{operation}[") for text in traced.values()}) == 1
    assert len({len(text) for text in traced.values()}) == 3


def test_the_networks_are_themselves_again_afterwards():
    with networks.normalized_by("none"):
        assert networks.examples.nj is not nj
    assert networks.examples.nj is nj
    assert networks.resnet.BatchNorm is nj.linen.BatchNorm


@pytest.mark.slow
def test_a_row_has_times_memory_and_the_error_of_the_losses():
    row = training.row(TINY["transformer, layer norm,"], ["normjax", "flax.linen", "none"], 2)
    for name, got in row["peers"].items():
        assert got["ms_low"] <= got["ms"] <= got["ms_high"]
        assert got["temporary_bytes"] > 0 and got["kept_bytes"] > 0 and got["compile_seconds"] > 0
        assert name != "flax.linen" or got["error"] < 1e-5


@pytest.mark.slow
def test_a_peer_that_trains_otherwise_is_left_out(monkeypatch):
    def wrong(case):
        return lambda params, stats, x: nj.layer_norm(params, stats, 3 * jnp.abs(x), train=True)

    monkeypatch.setitem(networks.peers.PEERS, "haiku", wrong)
    row = training.row(TINY["transformer, layer norm,"], ["normjax", "haiku"], 2)
    assert row["peers"]["haiku"]["skipped"].startswith("wrong: the loss is off by ")


def test_time_that_is_up_leaves_rows_out_by_name(capsys):
    assert training.run(list(TINY.values()), ["normjax"], 1, seconds=-1) == []
    assert all(network.title in capsys.readouterr().out for network in [TINY["inception"]])


@pytest.mark.slow
def test_a_step_lowers_the_loss():
    network = TINY["inception"]
    inputs, labels = networks.batch(network)
    state = jax.jit(network.init)(jax.random.key(0), inputs)
    step = jax.jit(networks.step(network))
    losses = []
    for _ in range(20):
        *state, loss = step(*state, inputs, labels)
        losses.append(float(loss))
    assert (np.diff(losses) < 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_the_networks_that_are_only_compiled_are_traced(name):
    network = READ[name]
    inputs, labels = jax.eval_shape(lambda: networks.batch(network))
    state = jax.eval_shape(network.init, jax.random.key(0), inputs)
    *new, loss = jax.eval_shape(networks.step(network), *state, inputs, labels)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert jax.tree.map(jnp.shape, tuple(new)) == jax.tree.map(jnp.shape, state)


def test_a_vit_tells_images_apart_by_every_patch_and_where_it_is():
    norm = lambda params, x: jax.nn.standardize(x)  # noqa: E731
    model = transformers.ViT("layer", 32, 1, 10, "float32", norm)
    images = np.random.default_rng(0).standard_normal((2, 32, 48, 3), np.float32)
    params, _ = model.init(jax.random.key(0), images)
    assert params["position"].shape == (1, 2 * 3 + 1, 32)
    logits = jax.jit(lambda images: model.logits(params, {}, images)[0])
    corner = images.copy()
    corner[:, -1, -1] += 1
    swapped = np.concatenate([images[:, 16:], images[:, :16]], 1)  # the rows of patches
    for other in (corner, swapped):
        assert np.abs(logits(other) - logits(images)).max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["normjax", "flax.linen", "formula"])
def test_the_critic_learns_the_rewards_and_moves_its_statistics(peer):
    network = READ["crossq critic"]
    inputs, rewards = networks.batch(network)
    with networks.normalized_by(peer):
        state = jax.jit(network.init)(jax.random.key(0), inputs)
        step, losses = jax.jit(networks.step(network)), []
        for _ in range(20):
            *state, loss = step(*state, inputs, rewards / networks.CLASSES)
            losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    first = state[1][0]["mean"]
    assert np.abs(first).max() > 0.01
    np.testing.assert_allclose(first, (1 - 0.9**20) * inputs.mean((0, 1)), rtol=1e-3, atol=1e-5)


def test_a_bottleneck_of_bit_is_the_same_with_normjax_and_with_the_formula(rng):
    x = rng.normal(size=(2, 4, 4, 64)).astype(np.float32)
    own, formula = (bit.Unit(peer, 32, 2) for peer in bit.NORMS)
    params = jax.jit(own.init)(jax.random.key(0), x)["params"]
    renamed = {name.replace("Conv", "StdConv"): leaves for name, leaves in params.items()}
    found = jax.jit(own.apply)({"params": params}, x)
    assert_close(found, jax.jit(formula.apply)({"params": renamed}, x), rtol=1e-4, atol=1e-4)
