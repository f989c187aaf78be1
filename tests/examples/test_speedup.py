import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import speedup
from common.interrupt import Interrupted
from common.networks import UNITS
from common.training import Trainer
from studies.speedup import inception

ROOT = Path(__file__).parents[2]
TINY = ["--eval-every", "20", "--sweep", "3", "--train-examples", "200", "--test-examples", "90"]


def start(*arguments):
    command = [sys.executable, str(ROOT / "examples" / "speedup.py"), *map(str, arguments)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "80"}
    environment |= {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(folder):
    return json.loads((folder / "speedup.json").read_text())


def is_plot(folder):
    return (folder / "speedup.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def small_inception(monkeypatch):
    """Puts one module in place of the three of `--network inception`, to compile a third."""
    small = functools.partial(inception.inception, stem=4, widths=(2,))
    monkeypatch.setattr(inception, "inception", small)


# Most of the time goes into compiling: a last part of another length would be one more program for
# each network.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "seeds", "points", "variants", "depths"),
    [("mlp", 2, [20, 40, 45], 4, [2]), ("inception", 1, [20, 40], 6, [])],
)
def test_end_to_end(tmp_path, capsys, small_inception, network, seeds, points, variants, depths):
    arguments = ["--network", network, *TINY, "--out", tmp_path, "--depths", *depths]
    arguments += ["--steps", points[-1], "--seeds", seeds]
    with jax.numpy_dtype_promotion("standard"):
        assert speedup.main(list(map(str, arguments))) == 0
    out = capsys.readouterr().out
    assert "As in the paper" in out and "Stricter than the paper" in out
    assert f"Plot: {tmp_path / 'speedup.png'}" in out and is_plot(tmp_path)
    content = results(tmp_path)
    assert content["status"] == "finished" and content["config"]["train_examples"] == 200
    assert (
        len(content["variants"]) == variants
        and len(content["sweep"]) == 1
        and len(content["tables"]) == 2
    )
    assert (
        content["tables"][0]["reported"]["BN-x5"] == "14.8x 73.0%"
        and content["tables"][1]["reported"] == {}
    )
    assert [depth["layers"] for depth in content["depths"]] == depths
    for depth in content["depths"]:
        for kind in ("plain", "normalized"):
            assert [result["learning_rate"] for result in depth[kind]] == [0.5, 3.0]
            assert all(
                run["steps"] == [points[-1] // 8]
                for result in depth[kind]
                for run in result["seeds"]
            )
    for variant in content["variants"]:
        assert [run["seed"] for run in variant["seeds"]] == list(range(seeds))
        assert all(
            run["steps"] == points and len(run["accuracies"]) == len(points)
            for run in variant["seeds"]
        )


@pytest.mark.slow
def test_interrupt_keeps_what_is_finished(tmp_path):
    process = start(
        "--steps",
        4_000,
        "--eval-every",
        100,
        "--train-examples",
        200,
        "--seeds",
        1,
        "--out",
        tmp_path,
    )
    try:
        # The baseline takes some seconds, and the signal comes while the next variant is trained.
        deadline = time.monotonic() + 90
        while not (tmp_path / "speedup.json").exists() or not results(tmp_path)["variants"]:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error and "As in the paper" in out and "Stricter" not in out
    assert (
        "1 of 4 variants are finished" in out
        and "0 of 5 depths" in out.replace("\n", " ")
        and is_plot(tmp_path)
    )
    content = results(tmp_path)
    assert content["status"] == "interrupted" and len(content["tables"]) == 1
    assert [variant["variant"] for variant in content["variants"]] == ["Baseline"]


def test_mistakes_end_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    missing = ["--data", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "out"]
    no_folder = ["--out", tmp_path / "file"]
    for arguments, says, status in (
        (missing, tmp_path / "data_batch_1.bin", 2),
        (no_folder, tmp_path / "file", 1),
    ):
        assert speedup.main(list(map(str, arguments))) == status
        out, error = capsys.readouterr()
        assert str(says) in error and error.count("\n") == 1 and out == ""
        assert ("https://www.cs.toronto.edu/~kriz/cifar.html" in error) == (status == 2)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stopped:
        speedup.main(["--out", str(tmp_path)])
    assert '"normjax[examples]", or pip install scikit-learn' in str(stopped.value)


def test_a_missing_module_of_the_program_is_not_taken_for_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "studies.speedup.study", None)
    with pytest.raises(ModuleNotFoundError, match="studies.speedup.study"):
        speedup.main(["--out", str(tmp_path)])


def test_a_folder_of_data_that_are_not_read_from_one_is_a_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        speedup.main(["--data-dir", str(tmp_path)])
    assert exit.value.code == 2 and "digits are not read from files" in capsys.readouterr().err


def accuracies(folder):
    """The curves of all runs, by variant, rate and seed."""
    content = results(folder)
    parts = [*content["variants"], *content["sweep"]]
    return {
        (part["variant"], part["learning_rate"], run["seed"]): (run["steps"], run["accuracies"])
        for part in parts
        for run in part["seeds"]
    }


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    arguments = [*TINY, "--steps", "60", "--seeds", "2", "--depths", "--out"]
    assert speedup.main([*arguments, str(tmp_path / "whole")]) == 0
    taken, step_of, pressed_at = [], Trainer._compile, 9

    def counted(self, state, shape):
        step = step_of(self, state, shape)

        def take(*inputs):
            taken.append(1)
            if len(taken) == pressed_at:
                os.kill(os.getpid(), signal.SIGINT)
            return step(*inputs)

        return take

    monkeypatch.setattr(Trainer, "_compile", counted)
    # Of 3 chunks a run: after the third run's third chunk, and in the middle of the fifth run.
    assert speedup.main([*arguments, str(tmp_path / "parts")]) == 130
    assert "1 of 4 variants are finished" in capsys.readouterr().out
    pressed_at = 14
    assert speedup.main([*arguments, str(tmp_path / "parts")]) == 130
    assert speedup.main([*arguments, str(tmp_path / "parts")]) == 0
    assert len(taken) == 3 * 2 * 5, "no chunk is trained twice"
    assert accuracies(tmp_path / "parts") == accuracies(tmp_path / "whole")
    assert [file.name for file in (tmp_path / "parts").iterdir() if file.suffix == ".state"] == []


@pytest.mark.slow
def test_other_options_begin_anew(tmp_path, monkeypatch):
    finish = Trainer.finish

    def interrupted(self, *arguments, **keywords):
        finish(self, *arguments, **keywords)
        raise Interrupted

    arguments = [*TINY, "--seeds", "1", "--depths", "--out", str(tmp_path), "--steps"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish", interrupted)
        assert speedup.main([*arguments, "20"]) == 130
    assert speedup.main([*arguments, "40"]) == 0
    assert all(run["steps"] == [20, 40] for run in results(tmp_path)["variants"][0]["seeds"])


@pytest.mark.parametrize(("modules", "kernels"), [(3, 1 + 3 * 7 + 1), (10, 1 + 8 * 7 + 2 * 5 + 1)])
def test_modules_are_those_of_the_paper(modules, kernels):
    """At full width: the channels that the paper's figure 5 has after each module."""
    options = speedup.parse(["--network", "inception", "--modules", str(modules)])
    make = inception.inception if options.modules == 3 else inception.inception_of_ten
    network = make(UNITS["batch"])
    params, _ = jax.eval_shape(lambda key: network.init(key, (32, 32, 3), 10), jax.random.key(0))
    assert len(params) == kernels


def test_channels_are_those_of_the_papers_figure_5():
    channels, found = 192, []
    for module in inception.PAPER.values():
        channels = module.outputs(channels)
        found.append(channels)
    assert found == [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
    network = inception.inception_of_ten(UNITS["batch"], width=64)
    params, _ = jax.eval_shape(lambda key: network.init(key, (32, 32, 3), 10), jax.random.key(0))
    assert params["4e/double_b"]["kernel"].shape == (3, 3, 256, 256)
    assert params["5b/pool"]["kernel"].shape == (1, 1, 1024, 128)
    # The paper: 13.6 million parameters, of which 1.8 are in its stem and classifier of 1,000.
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 9e6 < count < 11.5e6


def test_modules_are_of_the_inception(capsys):
    with pytest.raises(SystemExit):
        speedup.parse(["--modules", "10"])
    assert "--modules is for --network inception" in capsys.readouterr().err
