import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.networks import Network
from common.training import Examples, State
from landscape import main, parse
from studies.landscape import study
from studies.landscape.study import (
    STEP_SIZES,
    compared,
    eigenvalues,
    finite,
    history,
    instruments,
    listed,
    shown,
)

from tests.compare import assert_close


def softmax_loss(params, images, labels):
    logits = np.asarray(images, float) @ np.asarray(params, float)
    logits -= logits.max(1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels])


@pytest.mark.slow
def test_the_instruments_see_the_batch():
    """Softmax regression: the loss along its gradient, and its Hessian's largest eigenvalue."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (20, 5)), rng.integers(3, size=20)
    train = Examples(
        jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels), jnp.zeros(1), jnp.full(1, 255.0)
    )
    params, rows = rng.normal(size=(5, 3)), np.arange(3, 11)
    state = State(jnp.asarray(params, jnp.float32), {}, None)

    def apply(params, batch_stats, images, train):
        return images @ params, batch_stats

    walk, sharpness = instruments(Network(lambda *arguments: ({}, {}), apply))
    x, y = pixels[rows] / 255, labels[rows]
    p = np.exp(x @ params) / np.exp(x @ params).sum(1, keepdims=True)
    gradient = x.T @ (p - np.eye(3)[y]) / len(rows)
    seen = walk(state, train, jnp.asarray(rows))
    assert_close(seen.loss, softmax_loss(params, x, y), rtol=1e-5)
    expected = [softmax_loss(params - size * gradient, x, y) for size in STEP_SIZES]
    assert_close(seen.losses, np.asarray(expected), rtol=1e-5)
    hessian = sum(
        np.kron(np.outer(a, a), np.diag(b) - np.outer(b, b)) for a, b in zip(x, p, strict=True)
    ) / len(rows)
    found = sharpness(state, train, jnp.asarray(rows))
    assert_close(found.value, np.linalg.eigvalsh(hessian)[-1], rtol=1e-4)
    assert jax.tree.leaves(found.vector) == []


def test_what_diverged_is_no_number():
    diverged = listed(np.asarray([[1.0, np.nan], [np.inf, 2.0]]))
    np.testing.assert_array_equal(diverged, [[1.0, np.nan], [np.nan, 2.0]])
    assert shown(0.12345) == "0.123" and shown(np.nan) == "diverged"
    assert finite(np.asarray([1.0, np.nan])).tolist() == [1.0]
    assert finite(np.asarray([np.nan])).tolist() == [np.inf]
    assert compared(6.0, 2.0) == "3 times less" and compared(2.0, 6.0) == "3 times more"


def test_medians_over_the_seeds():
    fields = {name: [[1.0, 2.0]] for name in ("losses", "gradient_distances", "distances")}
    runs = [
        {"landscape": {"loss": [value], **fields}, "eigenvalues": [value, value + 1]}
        for value in (1.0, 5.0, 2.0)
    ]
    assert history(runs).loss.tolist() == [2.0] and history(runs).losses.tolist() == [[1.0, 2.0]]
    assert eigenvalues(runs).tolist() == [2.0, 3.0]


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "WIDTHS", ((4,),))
    arguments = [
        "--steps",
        "4",
        "--eval-every",
        "2",
        "--seeds",
        "1",
        "--learning-rates",
        "0.1",
        "--checkpoints",
        "2",
    ]
    assert main([*arguments, "--train-examples", "100", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "landscape.json").read_text())
    assert content["status"] == "finished"
    assert list(content["results"]) == ["no normalization, rate 0.1", "batch norm, rate 0.1"]
    for (run,) in content["results"].values():
        assert run["steps"] == [2, 4] and run["checkpoints"] == [2, 4]
        assert np.shape(run["landscape"]["losses"]) == (2, len(STEP_SIZES))
        assert len(run["eigenvalues"]) == len(run["converged"]) == 2 and min(run["eigenvalues"]) > 0
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")
    assert "Reported by Santurkar et al. (2018), and measured here" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys):
    assert parse(["--learning-rates", "0.1", "1"]).learning_rates == [0.1, 1.0]
    with pytest.raises(SystemExit):
        parse(["--learning-rates", "0"])
    error = capsys.readouterr().err
    assert "expected a positive number, got '0'" in error and error.count("\n") == 1
