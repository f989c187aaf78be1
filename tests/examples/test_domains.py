import copy
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.data import Dataset
from domains import main, parse
from studies.domains import study
from studies.domains.ways import NETWORK, SHIFTS, WAYS, condition

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close

PIXELS, BATCH_SIZE = 6, 8


@pytest.fixture
def images(rng):
    """Two domains, far apart."""
    clean = rng.normal(size=(2, BATCH_SIZE, PIXELS))
    return jnp.asarray(clean * [[[1.0]], [[0.2]]] + [[[0.0]], [[3.0]]], jnp.float32)


@functools.cache
def initialized(name):
    init = jax.jit(WAYS[name].init, static_argnums=(0, 2, 3))
    return jax.device_get(init(NETWORK, jax.random.key(0), (1, PIXELS, 1), 2))


def start(name):
    """The parameters and statistics of a way, the caller's own copy."""
    return copy.deepcopy(initialized(name))


@functools.partial(jax.jit, static_argnums=0)
def train(name, params, batch_stats, images):
    return WAYS[name].train(NETWORK, params, batch_stats, images)


def hidden(params, images):
    return np.asarray(images, np.float64) @ np.asarray(params["hidden_0"]["kernel"], np.float64)


@pytest.mark.slow
def test_each_way_normalizes_by_the_statistics_that_it_names(images):
    """The first layer's running means after one batch: they say what was normalized with what."""
    new = {name: train(name, *start(name), images)[1] for name in WAYS}
    clean, shifted = (x.mean(0) for x in hidden(start("mixed")[0], images))
    assert_close(new["mixed"]["hidden_0"]["mean"], 0.1 * (clean + shifted) / 2, atol=1e-5)
    assert_close(new["in turn"]["hidden_0"]["mean"], 0.1 * (0.9 * clean + shifted), atol=1e-5)
    assert_close(new["own"][0]["hidden_0"]["mean"], 0.1 * clean, atol=1e-5)
    assert_close(new["own"][1]["hidden_0"]["mean"], 0.1 * shifted, atol=1e-5)
    assert_trees_close(new["conditional"], new["mixed"], atol=1e-5)


@pytest.mark.slow
def test_in_turn_and_own_train_the_same_params(images):
    def loss(params, name, batch_stats):
        return (WAYS[name].train(NETWORK, params, batch_stats, images)[0] ** 2).sum()

    gradients = {}
    for name in ("in turn", "own"):
        params, batch_stats = start(name)
        gradients[name] = jax.jit(jax.grad(loss), static_argnums=1)(params, name, batch_stats)
    assert_trees_close(gradients["in turn"], gradients["own"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_each_domain_is_inferred_with_its_own(images):
    params, batch_stats = start("own")
    _, batch_stats = train("own", params, batch_stats, images)
    for domain in (0, 1):
        expected = NETWORK.apply(params, batch_stats[domain], images[domain], False)
        own = WAYS["own"].apply(NETWORK, params, batch_stats, images[domain], domain, False)
        assert_identical(own, expected)


@pytest.mark.slow
def test_conditional_examples_get_the_scale_and_bias_of_their_domain(images, rng):
    params, batch_stats = start("conditional")
    params["hidden_0"]["norm"] = {
        leaf: jnp.asarray(rng.normal(size=(2, 128)), jnp.float32) for leaf in ("scale", "bias")
    }
    domains = jnp.asarray(rng.integers(2, size=BATCH_SIZE))
    chosen = condition(params, domains)
    assert chosen["hidden_0"]["norm"]["scale"].shape == (BATCH_SIZE, 128)
    assert chosen["logits"] is params["logits"]
    x = hidden(params, images[0])
    y, _ = nj.batch_norm(
        chosen["hidden_0"]["norm"], batch_stats["hidden_0"], jnp.asarray(x, jnp.float32), True
    )
    normalized = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    scale, bias = (
        np.asarray(params["hidden_0"]["norm"][leaf])[np.asarray(domains)]
        for leaf in ("scale", "bias")
    )
    assert_close(y, scale * normalized + bias, atol=1e-4)


@pytest.mark.slow
def test_conditional_training_gathers_the_rows_of_each_domain(images):
    params, batch_stats = start("conditional")
    params["hidden_1"]["norm"]["scale"][1] = 0
    logits = np.asarray(train("conditional", params, batch_stats, images)[0])
    assert (np.ptp(logits[0], axis=0) > 0.01).all() and (logits[1] == 0).all()


@pytest.mark.slow
def test_conditional_starts_as_mixed(images):
    (logits, _), (same, _) = (
        train(name, *start(name), images) for name in ("mixed", "conditional")
    )
    assert_close(logits, same, atol=1e-5)
    init = jax.jit(NETWORK.init, static_argnums=(1, 2))
    assert_identical(start("mixed"), jax.device_get(init(jax.random.key(0), (1, PIXELS, 1), 10)))


@pytest.mark.parametrize("shift", SHIFTS)
def test_domains_show_the_same_digits(shift, rng):
    pixels = rng.integers(0, 17, (3, 8, 8, 1)).astype(np.uint8)
    images = Dataset(pixels, np.arange(3), pixels, np.arange(3), peak=16)
    (made, labels), (test, _) = study.make_domains(images, shift)
    assert made.shape == (2, 3, 64) and labels.tolist() == [0, 1, 2]
    assert_close(made[0], pixels.reshape(3, 64) / 16, atol=1e-6)
    correlation = np.corrcoef(made[0].ravel(), made[1].ravel())[0, 1]
    assert abs(correlation) > 0.4 and math.copysign(1, correlation) == (
        -1 if shift == "inverted" else 1
    )
    assert np.array_equal(made[1], test[1]) == (shift == "inverted"), "other random numbers"


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    arguments = ["--steps", "50", "--eval-every", "25", "--seeds", "1", "--shift", "faint"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "domains.json").read_text())
    assert content["status"] == "finished" and list(content["ways"]) == list(WAYS)
    last = {name: {domain: curve[-1] for domain, curve in runs[0]["accuracies"].items()}
            for name, runs in content["ways"].items()}  # fmt: skip
    assert all(run[0]["steps"] == [25, 50] for run in content["ways"].values())
    assert all(accuracies["as they are"] > 0.7 for accuracies in last.values())
    assert last["own"]["faint"] > last["in turn"]["faint"] + 0.1
    assert (tmp_path / "domains.png").read_bytes().startswith(b"\x89PNG")
    assert "one for each domain" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys):
    with pytest.raises(SystemExit):
        parse(["--shift", "sideways"])
    error = capsys.readouterr().err
    assert "--shift: invalid choice: 'sideways'" in error and error.count("\n") == 1
