"""Runs real processes: any number of them gives the same losses, even if some are killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_resnet.launch import without_processes

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "examples" / "train_resnet")]
TINY = [
    "--network",
    "resnet8",
    "--width",
    "4",
    "--image-size",
    "8",
    "--dtype",
    "float32",
    "--no-distributed",
]
TINY += [
    "--batch-size",
    "32",
    "--norm-group",
    "16",
    "--train-examples",
    "96",
    "--test-examples",
    "40",
]
TINY += ["--steps", "40", "--checkpoint-every", "10", "--eval-every", "20", "--log-every", "1"]
ALONE = ["--devices", "4"]
MINUTE = 60


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Turns off optimizations and caches programs, so that runs spend little time compiling."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    cache["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return (
        os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", "JAX_PLATFORMS": "cpu"}
        | cache
    )


@pytest.fixture(scope="module")
def start(environment):
    """Starts the program; whatever is left of it ends with the test module."""
    started = []

    def begin(out, *arguments):
        command = [*PROGRAM, *TINY, "--out", str(out), *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def run(start):
    """Runs the program to its end and returns its standard error."""

    def complete(out, *arguments, status=0, timeout=200):
        process = start(out, *arguments)
        _, error = process.communicate(timeout=timeout)
        assert process.returncode == status, error
        return error

    return complete


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """A run in one process with 4 devices, which statistics are shared on in groups of 2."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(out, *ALONE)
    return out


@pytest.fixture
def started_apart(start):
    """Starts each process by itself, as a cluster would, without a launcher."""

    def begin(out, count=2, **own):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        place = ["--coordinator", address, "--process-count", count, "--process-index"]
        rest = [own.get(f"process{index}", []) for index in range(count)]
        return [
            start(out, "--devices", 4 // count, *place, index, *rest[index])
            for index in range(count)
        ]

    return begin


def lines(out, split="train"):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def final_stats(out):
    """The running statistics in the last checkpoint, by name."""
    folder = out / "checkpoints" / "40" / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(restored["batch_stats"])
    }


def assert_same_run(out, expected):
    """Losses of all steps, evaluations, and the statistics at the end."""
    for split in ("train", "test"):
        seen, right = lines(out, split), lines(expected, split)
        assert [line["step"] for line in seen] == [line["step"] for line in right]
        for name in ("loss", "accuracy"):
            np.testing.assert_allclose(
                [x[name] for x in seen], [x[name] for x in right], rtol=2e-4, atol=1e-5
            )
    seen, right = final_stats(out), final_stats(expected)
    assert seen.keys() == right.keys() and len(right) == 18
    for name, value in right.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def wait_for(condition, processes, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [
            p.communicate() for p in processes
        ]
        time.sleep(0.005)


def in_mid_training(out):
    """Whether a checkpoint is complete and some more steps are taken."""
    return (out / "checkpoints" / "10").exists() and len(lines(out)) >= 12


def test_metrics_and_checkpoints_are_left(undisturbed):
    train, test = lines(undisturbed), lines(undisturbed, "test")
    assert [line["step"] for line in train] == list(range(1, 41)) and [
        line["step"] for line in test
    ] == [20, 40]
    assert train[-1]["loss"] < 0.9 * train[0]["loss"] and train[-1]["images_per_second"] > 0
    (events,) = (undisturbed / "tensorboard").iterdir()
    assert all(
        tag in events.read_bytes()
        for tag in (b"train/loss", b"train/images_per_second", b"test/accuracy")
    )
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "20",
        "30",
        "40",
    ]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one_does(processes, run, undisturbed, tmp_path):
    run(tmp_path, "--processes", processes, "--devices", 4 // processes)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_devices_make_no_difference(devices, run, undisturbed, tmp_path):
    run(tmp_path, "--devices", devices)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_and_a_restart_goes_on(
    victim, started_apart, run, undisturbed, tmp_path
):
    soon = ["--heartbeat", "15"]
    processes = started_apart(tmp_path, process0=soon, process1=soon)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and in_mid_training(tmp_path), processes)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, error = processes[1 - victim].communicate(timeout=MINUTE)
    assert time.monotonic() - killed < MINUTE
    assert processes[1 - victim].returncode != 0
    # Either a collective fails, or JAX's runtime misses the other's heartbeats first and ends the
    # process.
    last = error.splitlines()[-1]
    assert (
        last.startswith(f"train_resnet: error: process {1 - victim} ")
        and "Start all processes again" in last
    )
    assert "which may have died" in last or "as another process is gone" in last
    assert len(lines(tmp_path)) < 40

    error = run(tmp_path, *ALONE)
    assert "UserWarning" not in error.replace("cut off while it was written", "")
    assert_same_run(tmp_path, undisturbed)


def test_sigterm_to_one_process_saves_and_ends_all_with_0(
    started_apart, run, undisturbed, tmp_path
):
    processes = started_apart(tmp_path)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(lines(tmp_path)) >= 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, error = process.communicate(timeout=MINUTE)
        assert process.returncode == 0, error
    last = lines(tmp_path)[-1]["step"]
    assert last < 40 and (tmp_path / "checkpoints" / str(last)).is_dir()

    run(tmp_path, *ALONE)
    assert_same_run(tmp_path, undisturbed)


def test_checkpoints_that_are_cut_off_or_changed_are_skipped(run, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["20", "30", "40"]
    # as a process leaves it that dies
    (checkpoints / "40").rename(checkpoints / "50.orbax-checkpoint-tmp")
    shutil.copytree(checkpoints / "30", checkpoints / "40")
    for path in (checkpoints / "40").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.rmtree(checkpoints / "30" / "state")  # can be read, but is not what was written
    shutil.copytree(checkpoints / "20" / "state", checkpoints / "30" / "state")

    error = run(tmp_path, *ALONE)
    assert "50.orbax-checkpoint-tmp: skipped: it was cut off" in error
    for step in (40, 30):
        assert f"{checkpoints / str(step)}: skipped for the checkpoint before it" in error
    assert "arrays are not as they were written" in error
    assert_same_run(tmp_path, undisturbed)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "20",
        "30",
        "40",
        "corrupt-30",
        "corrupt-40",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--norm-group", "12"],
            "--norm-group 12 does not partition --batch-size 32 on 4 devices of 8 examples",
        ),
        (["--data", "cifar10", "--data-dir", "nowhere"], "nowhere/data_batch_1.bin: not found"),
        (["--data", "cifar10"], "--data cifar10 needs --data-dir"),
    ],
)
def test_mistakes_get_one_line(arguments, says, run, tmp_path):
    error = run(tmp_path, *ALONE, *arguments, status=2)
    assert error.startswith("train_resnet: error: ") and says in error and error.count("\n") == 1


def test_processes_with_different_arguments_stop_at_the_start(started_apart, tmp_path):
    processes = started_apart(tmp_path, process1=["--learning-rate", "0.3"])
    errors = [process.communicate(timeout=MINUTE)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    says = "train_resnet: error: process 1 has --learning-rate 0.3, process 0 has 0.0125"
    assert [line for line in errors[0].splitlines() if "error" in line] == [says]
    assert "error" not in errors[1]


def test_another_course_of_training_is_not_continued(run, undisturbed):
    error = run(undisturbed, *ALONE, "--seed", "1", status=2)
    assert "was made with --seed 0, not 1; choose another --out" in error and error.count("\n") == 1


def test_the_launcher_leaves_all_other_arguments():
    assert without_processes(["x", "--processes", "2", "--seed", "1"]) == ["x", "--seed", "1"]
    assert without_processes(["x", "--processes=2", "--seed", "1"]) == ["x", "--seed", "1"]
