import json
from argparse import Namespace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.networks import UNITS, linear, vgg
from studies.without_batch.study import (
    GAIN,
    InitializingUnit,
    WithoutBatch,
    influence,
    initialized_from,
    units,
)
from without_batch import NORMS, main, parse

import normjax as nj
from tests.compare import assert_trees_close

MAKE = partial(vgg, widths=((8, 8), (16,)))
IMAGES = (4, 4, 2)


@pytest.fixture
def images(rng):
    return jnp.asarray(3 + 2 * rng.normal(size=(12, *IMAGES)), jnp.float32)


@pytest.mark.slow
def test_data_dependent_initialization_gives_the_first_batch_mean_0_and_variance_1(images):
    params, batch_stats = initialized_from(images, MAKE).init(jax.random.key(0), IMAGES, 10)
    layers, x = ("conv_0_0", "conv_0_1"), images
    for layer in (params[name] for name in layers):
        kernel, _ = nj.weights.weight_norm(layer["norm"], {}, layer["kernel"], True)
        y = linear({"kernel": kernel, "bias": layer["bias"]}, x)
        np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
        x = jax.nn.relu(y)
    # Found again by a second pass, layers behind the pooling included.
    _, found = MAKE(InitializingUnit(*UNITS["weight norm"])).apply(
        params, batch_stats, images, True
    )
    assert_trees_close(found, {name: params[name] for name in found}, rtol=1e-4, atol=1e-4)
    assert set(found) == {"conv_0_0", "conv_0_1", "conv_1_0"}


@pytest.mark.slow
def test_data_dependent_initialization_starts_from_the_kernels_of_all(images):
    ours, plain = (
        network.init(jax.random.key(3), IMAGES, 10)[0]
        for network in (initialized_from(images, MAKE), MAKE(UNITS["none"]))
    )
    assert all(np.array_equal(ours[name]["kernel"], plain[name]["kernel"]) for name in plain)
    assert not any(np.allclose(ours[name]["bias"], 0) for name in ours if name != "logits")


@pytest.mark.slow
def test_the_gain_is_what_relu_takes_from_the_variance(rng):
    assert abs(np.maximum(rng.normal(size=1_000_000), 0).var() * GAIN**2 - 1) < 0.01
    unit, kernel = (
        units()["weight standardization"],
        jnp.asarray(rng.normal(size=(3, 3, 8, 4)), jnp.float32),
    )
    norm, _ = unit.make(kernel)
    assert unit.of_kernel is not None
    standardized, _ = unit.of_kernel(norm, {}, kernel, True)
    np.testing.assert_allclose(standardized.reshape(-1, 4).var(0) * 72, GAIN**2, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
def test_others_matter_to_batch_norm_alone(name, images):
    moved = influence(MAKE(units()[name]), images)
    assert (moved > 0.01) == (name == "batch") and moved >= 0 and (name == "batch" or moved < 1e-5)


def result(training, test, others=0.0):
    return {"training": training, "test": test, "others": others}


def test_each_is_shown_at_its_best_rate():
    study = WithoutBatch(
        Namespace(norms=("batch", "none"), learning_rates=(1.0, 0.1, 0.01), seeds=3, steps=10)
    )
    study.results = {
        "batch, 1": result([1.0, 0.9, 0.8], [0.7, 0.9, 0.8], 0.5),
        "batch, 0.1": result([1.0] * 3, [0.84] * 3, 0.5),
        "batch, 0.01": result([0.5] * 3, [0.4] * 3, 0.5),
        "none, 0.01": result([0.6, 0.7, 0.1], [0.3, 0.5, 0.1]),
    }
    assert study.by_rate("batch", "training") == {0.01: 0.5, 0.1: 1.0, 1.0: 0.9}
    assert study.best() == {"batch": (0.1, 0.84), "none": (0.01, 0.3)}
    cells = [list(column.cells) for table in study.tables() for column in table.columns]
    shown = list(zip(*cells, strict=True))
    assert shown[0] == ("batch", "0.1", "100.0%", "84.0%", "0.1 to 1", "0.5")
    assert shown[1] == ("none", "0.01", "60.0%", "30.0%", "0.01 to 0.01", "0")
    (claim,) = study.claims()
    assert claim.measured == "30.0%, batch norm's 84.0%" and "Salimans" in claim.what
    del study.results["batch, 1"], study.results["batch, 0.1"], study.results["batch, 0.01"]
    assert study.claims() == []


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    arguments = [
        "--norms",
        "weight norm",
        "--learning-rates",
        "0.01",
        "0.1",
        "--steps",
        "20",
        "--seeds",
        "2",
    ]
    assert (
        main(
            [
                *arguments,
                "--train-examples",
                "200",
                "--test-examples",
                "100",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    content = json.loads((tmp_path / "without_batch.json").read_text())
    assert content["status"] == "finished" and list(content["results"]) == [
        "weight norm, 0.01",
        "weight norm, 0.1",
    ]
    for found in content["results"].values():
        assert all(
            len(found[which]) == 2 and 0 <= min(found[which]) <= 1 for which in ("training", "test")
        )
        assert found["others"] < 1e-5
    assert (tmp_path / "without_batch.png").read_bytes().startswith(b"\x89PNG")
    assert "rates within 5%" in " ".join(capsys.readouterr().out.split())


def test_mistakes_get_one_line(tmp_path, capsys):
    assert main(["--train-examples", "20", "--out", str(tmp_path)]) == 1
    assert "--batch-size 32: there are 20 examples\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--learning-rates", "0"])
    error = capsys.readouterr().err
    assert (
        "--learning-rates: expected a positive number, got '0'" in error and error.count("\n") == 1
    )
