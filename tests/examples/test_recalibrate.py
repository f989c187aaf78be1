import json

import jax
import numpy as np
import pytest
from common.data import Dataset
from common.training import examples
from recalibrate import main, parse
from studies.domains.ways import shifted
from studies.recalibrate import study

from tests.compare import assert_close, assert_trees_close

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainer():
    rng = np.random.default_rng(0)
    options = parse(
        [
            "--batch-size",
            "4",
            "--steps",
            "3",
            "--eval-every",
            "2",
            "--calibrate",
            "150",
            "--ema",
            "10",
        ]
    )
    pixels, labels = rng.integers(0, 17, (200, 4, 4, 1)).astype(np.uint8), rng.integers(0, 10, 200)
    images = Dataset(pixels, labels, pixels, labels, peak=16)
    kinds = {"as they are": images, "faint": shifted(images, "faint")}
    made = {name: examples(kind, standardize=False)[0] for name, kind in kinds.items()}
    return study.Trainer(made, made, options)


def test_the_average_is_that_of_weights_and_statistics(trainer):
    start, images = trainer.init(0), trainer.train["as they are"]
    rows = np.random.default_rng(0).integers(200, size=(2, 4), dtype=np.int32)
    one = trainer._steps(start, images, rows[:1])
    old, new = jax.device_get((start.optimizer[1], (one.params, one.batch_stats)))
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, old, new)
    assert_trees_close(one.optimizer[1], expected, rtol=1e-5, atol=1e-6)


def test_accuracies_are_those_of_the_test_images(trainer):
    state, test = trainer.init(0), trainer.test["faint"]
    infer = jax.jit(trainer.network.apply, static_argnums=3)
    logits, _ = infer(state.params, state.batch_stats, test.pick()[0], False)
    expected = np.mean(np.argmax(logits, -1) == np.asarray(test.labels))
    assert_close(trainer.evaluate(state, {})["faint / trained / running"], expected, atol=1e-6)


def test_calibration_images_come_in_batches_the_last_of_them_smaller(trainer):
    assert [len(batch) for batch in trainer.calibration("faint")] == [100, 50]


def test_each_line_is_evaluated_after_every_so_many_steps(trainer):
    run = trainer.run(0, lambda steps, accuracy: None)
    assert run["steps"] == [2, 3]
    lines = [("as they are", *which) for which in study.AS_THEY_ARE.values()]
    lines += [("faint", *which) for which in study.SHIFTED.values()]
    assert set(run["curves"]) == {study.key(*line) for line in lines}
    assert all(len(curve) == 2 for curve in run["curves"].values())


def test_end_to_end(tmp_path, capsys):
    arguments = [
        "--steps",
        "200",
        "--eval-every",
        "100",
        "--seeds",
        "1",
        "--ema",
        "100",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "recalibrate.json").read_text())
    assert content["status"] == "finished"
    (run,) = content["runs"]
    assert run["steps"] == [100, 200]
    last = run["last"]
    for way in study.WAYS:
        assert last[f"as they are / EMA / {way}"] > 0.9
        assert last[f"faint / trained / {way}"] > last["faint / trained / running"] + 0.3
    assert (
        run["curves"]["as they are / EMA / recalibrated"][0]
        > run["curves"]["as they are / EMA / running"][0] + 0.05
    )
    assert (tmp_path / "recalibrate.png").read_bytes().startswith(b"\x89PNG")
    assert "layer by layer" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse(["--calibrate", "0"])
    error = capsys.readouterr().err
    assert "--calibrate: expected a positive integer, got '0'" in error and error.count("\n") == 1
    assert main(["--data", "mnist", "--data-dir", str(tmp_path / "nowhere")]) == 2
    assert "not found" in capsys.readouterr().err
