import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


# Most of the time goes into compiling: a last part of another length would be one more program for
# each network.
@pytest.mark.parametrize(
    ("network", "seeds", "points", "variants", "depths"),
    [
        ("mlp", 2, [20, 40, 45], 4, [2]),
        pytest.param("inception", 1, [20, 40], 6, [], marks=pytest.mark.slow),
    ],
)
def test_end_to_end(tmp_path, network, seeds, points, variants, depths):
    arguments = [
        *TINY,
        "--depths",
        *depths,
        "--steps",
        points[-1],
        "--seeds",
        seeds,
        "--out",
        tmp_path,
    ]
    process = start("--network", network, *arguments)
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
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
        10_000,
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


def test_mistakes_end_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    missing = start("--data", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "out")
    no_folder = start("--out", tmp_path / "file")
    for process, says in (
        (missing, str(tmp_path / "data_batch_1.bin")),
        (no_folder, str(tmp_path / "file")),
    ):
        out, error = process.communicate(timeout=60)
        assert process.returncode == 1 and says in error and error.count("\n") == 1 and out == ""
