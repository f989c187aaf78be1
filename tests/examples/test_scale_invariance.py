"""The study of scale invariance: that it runs, and its arithmetic."""

import json
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import report
from common.data import CLASSES
from common.networks import UNITS, Network, vgg
from common.training import Examples, Plan
from scale_invariance import main, parse
from studies.scale_invariance import study as scaling
from studies.scale_invariance.rotations import Recorded, Setting, Turning, hidden_kernels

import normjax as nj
from tests.compare import assert_close, assert_identical

SIZE = (4, 4, 1)


@pytest.fixture
def examples(rng):
    images = jnp.asarray(rng.integers(0, 17, (40, *SIZE)), jnp.uint8)
    labels = jnp.asarray(rng.integers(0, CLASSES, 40), jnp.int32)
    return Examples(images, labels, jnp.zeros(1), jnp.full(1, 16.0))


def dense(epsilon):
    """One layer behind batch norm, and a linear one."""

    def init(key, image_shape, num_classes):
        kernel = jax.random.normal(key, (int(np.prod(image_shape)), num_classes))
        norm, batch_stats = nj.batch_norm_init(num_classes)
        return {
            "hidden": {"kernel": kernel, "norm": norm},
            "logits": {"kernel": jnp.eye(num_classes)},
        }, batch_stats

    def apply(params, batch_stats, images, train):
        x = images.reshape(len(images), -1) @ params["hidden"]["kernel"]
        x, batch_stats = nj.batch_norm(
            params["hidden"]["norm"], batch_stats, x, train, epsilon=epsilon
        )
        return x @ params["logits"]["kernel"], batch_stats

    return Network(init, apply)


def run(trainer, setting, steps=4, rate=0.1):
    seen, plan = [], Plan(0, rate, steps, 4, 8)
    with jax.numpy_dtype_promotion("standard"):  # optax's
        recorded = trainer.turn(setting, plan, lambda steps, remark: seen.append(steps))
    return recorded, seen


def test_hidden_kernels_are_all_but_the_last():
    for name in ("batch", "weight norm", "none"):
        network = vgg(UNITS[name], ((8,),))
        params, _ = jax.eval_shape(
            lambda key, network=network: network.init(key, SIZE, CLASSES), jax.random.key(0)
        )
        paths = jax.tree_util.tree_leaves_with_path(hidden_kernels(params))
        assert [jax.tree_util.keystr(path) for path, chosen in paths if chosen] == [
            "['conv_0_0']['kernel']"
        ]


@pytest.mark.slow
def test_scaled_kernels_take_the_same_path_bit_for_bit(examples):
    trainer = Turning(dense(epsilon=scaling.TINY), (examples, examples))
    one, other = (run(trainer, scaling.scaled(0.1, c))[0] for c in (1, 4))
    assert_identical(other.losses, one.losses)
    assert_identical(other.history["hidden/kernel"].norm, 4 * one.history["hidden/kernel"].norm)
    another, _ = run(trainer, Setting(0.1 * 16, scaling.PRODUCTS[0] / 0.1, 4))
    assert np.abs(another.losses - one.losses).max() > 1e-6


@pytest.mark.slow
def test_kernels_have_a_rate_and_decay_of_their_own(examples):
    trainer = Turning(dense(epsilon=1e-5), (examples, examples))
    recorded, seen = run(trainer, Setting(0.0, 3.0), steps=6, rate=0.0)
    assert seen == [4, 2] and len(recorded.losses) == 6 and len(recorded.accuracies) == 2
    assert_identical(
        recorded.history["hidden/kernel"].norm,
        np.full_like(recorded.losses, recorded.history["hidden/kernel"].norm[0]),
    )
    decayed, _ = run(trainer, Setting(1e-6, 1e5), rate=0.0)
    norms = decayed.history["hidden/kernel"].norm
    assert_close(norms[1:] / norms[:-1], np.full(3, 0.9), rtol=1e-4)


def rotations(norms, gradients=(1.0, 1.0, 1.0, 1.0)):
    norms, gradients = np.array(norms), np.array(gradients)
    return nj.diagnostics.Rotation(
        norms, gradients, 0.1 * norms, 0 * norms + 0.5, 0.3 * norms, 0.2 / norms**2
    )


def test_curves_are_means_over_kernels_and_blocks():
    history = {"a": rotations([1.0, 2.0, 3.0, 4.0]), "b": rotations([1.0, 8.0, 12.0, 1.0])}
    found = scaling.curves(
        Setting(0.2, 0.0), Recorded(np.array([4.0, 2.0, 1.0, 9.0]), history, [0.5, 0.6]), 3
    )
    assert found["steps"] == [3, 4] and found["accuracy"] == [0.5, 0.6]
    assert_close(found["loss"], [7 / 3, 9.0], rtol=1e-12)
    assert_close(found["norm"], [1.0, 6.0, 2.0], rtol=1e-12)
    assert_close(found["effective_learning_rate"], [0.2, 0.2 / 36, 0.2 / 4], rtol=1e-12)
    squares = [0.09 * (1 + 4 + 9) / 3, 0.09 * (1 + 64 + 144) / 3]
    assert_close(found["angle"][0], np.sqrt(np.mean(squares)), rtol=1e-12)
    assert found["radial"] == pytest.approx(12 * 0.1 / 0.5)
    json.dumps(found, allow_nan=False)


def test_growth_is_that_of_pythagoras():
    """Norms 1, sqrt(1 + 0.04 * 9), ...: each step is 0.2 times a gradient of length 3."""
    norms = np.sqrt(1 + 0.36 * np.arange(4))
    found = rotations(norms, 3 * np.ones(4))
    assert_close(scaling.explained(found, 0.2), norms, rtol=1e-12)
    kernels = scaling.growth(Setting(0.2, 0.0), Recorded(np.zeros(4), {"a": found}, []))["kernels"]
    assert_close(kernels["a"]["grown"], kernels["a"]["explained"], rtol=1e-12)


def test_settings_share_their_products():
    found = list(scaling.settings(0.1, "batch"))
    assert_close(
        [setting.rate * setting.decay for setting in found],
        [0.002, 0.002, 0.002, 0.004, 0.008],
        rtol=1e-12,
    )
    assert [setting.rate for setting in found] == [0.025, 0.1, 0.4, 0.1, 0.1]
    assert len(list(scaling.settings(0.1, "layer"))) == 3


def test_claims_are_made_of_what_is_finished():
    study = scaling.Scaling(Namespace())
    assert study.claims() == [] and study.tables() == []
    kernel = {"predicted": 0.06, "observed": 0.03, "ratio": 0.5}
    study.results["rotation/batch/0.1 x 0.02"] = {
        "rate": 0.1,
        "decay": 0.02,
        "kernels": {"a": kernel},
        "loss": [9.0, 1.0, 2.0],
        "accuracy": [0.1, 0.9],
    }
    study.results["scaled/1"] = {"losses": [1.0, 2.0]}
    study.results["scaled/4"] = {"losses": [1.0, 2.5]}
    claims = {claim.what: claim.measured for claim in study.claims()}
    assert claims == {
        "loss with kernels times c, lr c², wd / c²": "0.5 apart in 2 steps",
        "angle of a step by sqrt(2 lr wd), batch": "0.50 to 0.50",
        "loss by the product of lr and wd, batch": "0.002: 1.500",
    }
    (table,) = study.tables()
    assert table.row_count == 1


@pytest.mark.slow
def test_runs_that_diverge_are_said_to(tmp_path):
    study = scaling.Scaling(Namespace(data="digits"))
    history = {"a": rotations([1.0, 2.0, np.nan, np.nan])}
    setting, recorded = (
        Setting(0.2, 0.01),
        Recorded(np.array([1.0, np.nan, np.nan, np.nan]), history, [0.1, 0.1]),
    )
    curves = setting._asdict() | scaling.curves(setting, recorded, 2)
    study.results["growth/none"] = curves | scaling.growth(setting, recorded)
    study.results["rotation/none/0.2 x 0.01"] = curves | scaling.rotation(setting, recorded)
    assert sum("diverged" in claim.measured for claim in study.claims()) == 3
    (table,) = study.tables()
    assert "diverged" in list(table.columns[4].cells)
    study.draw(tmp_path / "plot.png")
    report.write_json(tmp_path / "results.json", study.results)
    assert json.loads((tmp_path / "results.json").read_text())["growth/none"]["loss"] == [
        None,
        None,
    ]


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "WIDTHS", {"digits": ((4,),)})
    monkeypatch.setattr(scaling, "KINDS", ("batch", "none"))
    with jax.numpy_dtype_promotion("standard"):
        arguments = [
            "--steps",
            "40",
            "--eval-every",
            "20",
            "--train-examples",
            "200",
            "--test-examples",
            "50",
        ]
        assert main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "scale_invariance.json").read_text())
    assert content["status"] == "finished" and content["config"]["learning_rate"] == 0.1
    results = content["results"]
    assert len(results) == 3 + 2 * 2 + 5 + 3
    invariant = {
        kind: results[f"test/{kind}"]["conv_0_0/kernel"]["invariant"] for kind in scaling.KINDS
    }
    assert invariant == {"batch": True, "none": False}
    assert (
        results["scaled/0.25"]["losses"]
        == results["scaled/1"]["losses"]
        == results["scaled/4"]["losses"]
    )
    (normalized,), (plain,) = (
        results[f"growth/{kind}"]["kernels"].values() for kind in ("batch", "none")
    )
    assert (
        normalized["grown"] == pytest.approx(normalized["explained"], rel=1e-4)
        and normalized["grown"] > 1.001
    )
    assert abs(plain["grown"] / plain["explained"] - 1) > 0.01
    assert (tmp_path / "scale_invariance.png").read_bytes().startswith(b"\x89PNG")
    assert "Reported by van Laarhoven" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys):
    with pytest.raises(SystemExit):
        parse(["--steps", "none"])
    error = capsys.readouterr().err
    assert "--steps: expected a positive integer, got 'none'" in error and error.count("\n") == 1
