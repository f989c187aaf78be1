import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.networks import mlp, style
from common.training import Examples, State
from covariate_shift import main, parse
from studies.covariate_shift import noise
from studies.covariate_shift.noise import DEVIATION, LAYERS, MEAN, SPREAD, Sigmoids, disturbed
from studies.covariate_shift.study import VARIANTS, instrument, steps_to, summary

from normjax.diagnostics import CovariateShift
from tests.compare import assert_close, assert_identical

IMAGES = jax.random.uniform(jax.random.key(5), (12, 4, 4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_without_noise_it_is_the_network_of_speedup(normalize):
    network, expected = Sigmoids(normalize), mlp(style(normalize, "sigmoid"), 3)
    variables = network.network.init(jax.random.key(0), (4, 4, 1), 10)
    assert_identical(variables, expected.init(jax.random.key(0), (4, 4, 1), 10))
    assert_identical(
        network.network.apply(*variables, IMAGES, True), expected.apply(*variables, IMAGES, True)
    )


@pytest.mark.slow
def test_the_noise_is_drawn_anew_for_each_step_and_unit_and_around_it_for_each_example():
    x = jnp.zeros((20_000, 6))
    shift = np.asarray(disturbed(jax.random.key(0), x))
    scale = np.asarray(disturbed(jax.random.key(0), x + 1)) - shift
    means, deviations = shift.mean(0), scale.mean(0)
    assert (np.abs(means) < MEAN + 0.01).all() and np.ptp(means) > 0.1
    assert (
        (deviations > 0.99).all()
        and (deviations < DEVIATION + 0.01).all()
        and np.ptp(deviations) > 0.02
    )
    assert_close(np.ptp(shift, axis=0), np.full(6, 2 * SPREAD), atol=0.01)
    assert_close(scale.std(0), np.full(6, SPREAD), atol=0.01)
    assert (np.abs(np.asarray(disturbed(jax.random.key(1), x)).mean(0) - means) > 1e-3).all()


@pytest.mark.slow
def test_noise_is_there_in_training_alone_and_its_key_moves_on():
    network = Sigmoids(normalize=True, noise=True)
    params, batch_stats = network.network.init(jax.random.key(0), (4, 4, 1), 10)
    clean = {name: stats for name, stats in batch_stats.items() if name != "noise"}
    _, new, inputs = network.forward(params, batch_stats, IMAGES, True)
    _, _, undisturbed = Sigmoids(normalize=True).forward(params, clean, IMAGES, True)
    assert (np.abs(np.asarray(inputs["hidden_0"] - undisturbed["hidden_0"])).max(0) > 1e-3).all()
    assert (
        jax.random.key_data(new["noise"]).tolist()
        != jax.random.key_data(batch_stats["noise"]).tolist()
    )
    logits, _, _ = network.forward(params, batch_stats, IMAGES, False)
    assert_identical(logits, Sigmoids(normalize=True).forward(params, clean, IMAGES, False)[0])


@pytest.mark.slow
def test_the_instruments_see_the_batch_and_the_probe():
    """A covariate shift of a step of plain gradient descent, and percentiles of each unit."""
    network = VARIANTS["no normalization"]
    params, batch_stats = network.network.init(jax.random.key(0), (4, 4, 1), 10)
    labels = jnp.arange(12, dtype=jnp.int32) % 10
    train = Examples(jnp.asarray(255 * IMAGES, jnp.uint8), labels, jnp.zeros(1), jnp.full(1, 255.0))
    still, moved = (
        instrument(network, rate)(State(params, batch_stats, None), train, jnp.arange(4))
        for rate in (0.0, 1.0)
    )
    assert still[0].values.shape == (3, 100)
    assert_close(still[1].cosine, np.ones(len(LAYERS)), atol=1e-5)
    assert_close(still[1].distance, np.zeros(len(LAYERS)), atol=1e-6)
    assert float(moved[1].distance[-1]) > 1e-4 and float(moved[1].distance[0]) < 1e-6


def test_the_numbers_of_a_run():
    """Three units whose medians move by 0, 2 and 10, with bands 2 wide; the second is typical."""
    middle = np.asarray([[0.0, 0, 0], [0, 2, 10], [0, 1, 5]])
    values = middle[:, None] + np.asarray([-1.0, 0, 1])[:, None]
    ones = np.ones((3, len(LAYERS)))
    seen = summary(values, CovariateShift(distance=ones, cosine=0.5 * ones, gradient_norm=4 * ones))
    assert seen["wander"] == 1.0 and seen["jump"] == 0.75
    assert np.asarray(seen["band"])[:, 1].tolist() == [0.0, 2.0, 1.0]
    assert (seen["relative_distance"], seen["typical_cosine"]) == (0.25, 0.5)


def test_steps_to():
    runs = [
        {"steps": [10, 20, 30], "accuracy": accuracies}
        for accuracies in ([0.1, 0.9, 0.95], [0.9, 0.2, 1.0])
    ]
    assert steps_to(0.9, runs) == "15" and steps_to(0.99, runs) == "not reached"


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    arguments = ["--steps", "6", "--eval-every", "3", "--seeds", "2", "--train-examples", "200"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "covariate_shift.json").read_text())
    assert content["status"] == "finished" and list(content["results"]) == list(VARIANTS)
    for runs in content["results"].values():
        assert [run["seed"] for run in runs] == [0, 1] and runs[0]["steps"] == [3, 6]
        assert (
            np.shape(runs[0]["band"]) == (2, 3)
            and len(runs[1]["distance"]) == len(runs[1]["cosine"]) == 2
        )
    assert (
        content["results"]["noisy batch norm"][0]["jump"]
        > content["results"]["batch norm"][0]["jump"]
    )
    assert all("noisy batch norm:" in claim["measured"] for claim in content["claims"])
    assert (tmp_path / "covariate_shift.png").read_bytes().startswith(b"\x89PNG")
    assert "Reported by Ioffe & Szegedy (2015)" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys):
    with pytest.raises(SystemExit):
        parse(["--data", "mnist"])
    error = capsys.readouterr().err
    assert "needs --data-dir" in error and error.count("\n") == 1
    assert noise.DEPTH == len(LAYERS) - 1
