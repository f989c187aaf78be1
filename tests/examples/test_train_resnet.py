"""Runs real processes: any number of them gives the same losses, even if some are killed."""

import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_resnet.launch import without_processes
from train_runs import MINUTE, checkpoints_of, lines, wait_for

ALONE = ["--devices", "4"]


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """A run in one process with 4 devices, which statistics are shared on in groups of 2."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(out, *ALONE)
    return out


def final_stats(out):
    """The running statistics in the last checkpoint, by name."""
    folder = out / "checkpoints" / "24" / "state"
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


def in_mid_training(out):
    """Whether a checkpoint is complete and some more steps are taken."""
    complete = (out / "metrics.jsonl").exists() and (out / "checkpoints" / "6").exists()
    return complete and len(lines(out)) >= 8


@pytest.mark.slow
def test_metrics_and_checkpoints_are_left(undisturbed):
    train, test = lines(undisturbed), lines(undisturbed, "test")
    assert [line["step"] for line in train] == list(range(1, 25))
    assert [line["step"] for line in test] == [12, 24]
    assert train[-1]["loss"] < 0.9 * train[0]["loss"] and train[-1]["images_per_second"] > 0
    (events,) = (undisturbed / "tensorboard").iterdir()
    assert all(
        tag in events.read_bytes()
        for tag in (b"train/loss", b"train/images_per_second", b"test/accuracy")
    )
    assert checkpoints_of(undisturbed) == ["12", "18", "24"]


# Each run that is cut short goes on with other processes and devices than it began with: that it
# ends as the undisturbed one shows that neither number makes a difference.
ONE_DEVICE, EIGHT_DEVICES = ["--devices", "1"], ["--devices", "8"]
TWO_PROCESSES = ["--processes", "2", "--devices", "2"]


class Killed(NamedTuple):
    """A run of two processes after one was killed: its folder, and how the other one ended."""

    out: Path
    status: int
    error: str
    seconds: float


@pytest.fixture(scope="module")
def killed(started_apart, tmp_path_factory):
    """By victim, as futures: the survivors do nothing but wait for a sign of life for a while."""
    soon = ["--heartbeat", "10"]
    outs = [tmp_path_factory.mktemp(f"victim_{victim}") for victim in range(2)]

    def end_of(survivor, out, begun):
        _, error = survivor.communicate(timeout=MINUTE)
        return Killed(out, survivor.returncode, error, time.monotonic() - begun)

    with ThreadPoolExecutor(len(outs)) as pool:
        found = []
        for victim, out in enumerate(outs):
            processes = started_apart(out, process0=soon, process1=soon)
            wait_for(partial(in_mid_training, out), processes)
            processes[victim].send_signal(signal.SIGKILL)
            found.append(pool.submit(end_of, processes[1 - victim], out, time.monotonic()))
        yield found


@pytest.mark.slow
@pytest.mark.usefixtures("killed")  # whose survivors wait meanwhile
def test_sigterm_to_one_process_saves_and_ends_all_with_0(
    started_apart, run, undisturbed, tmp_path
):
    processes = started_apart(tmp_path, count=4)  # which share statistics two by two
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(lines(tmp_path)) >= 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, error = process.communicate(timeout=MINUTE)
        assert process.returncode == 0, error
    last = lines(tmp_path)[-1]["step"]
    assert last < 24 and (tmp_path / "checkpoints" / str(last)).is_dir()

    run(tmp_path, *ALONE)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "then"), [(1, TWO_PROCESSES), (0, EIGHT_DEVICES)], ids=["another", "the first"]
)
def test_a_killed_process_ends_the_others_and_a_restart_goes_on(
    victim, then, killed, run, undisturbed
):
    out, status, error, seconds = killed[victim].result()
    assert seconds < MINUTE and status != 0
    # Either a collective fails, or JAX's runtime misses the other's heartbeats first and ends the
    # process.
    last = error.splitlines()[-1]
    assert (
        last.startswith(f"train_resnet: error: process {1 - victim} ")
        and "Start all processes again" in last
    )
    assert "it may have died" in last or "because another process is gone" in last
    assert len(lines(out)) < 24

    error = run(out, *then)
    warned = [line for line in error.splitlines() if "UserWarning" in line]
    assert all("cut off while it was written" in line for line in warned)
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_checkpoints_that_are_cut_off_or_changed_are_skipped(run, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    assert checkpoints_of(tmp_path) == ["12", "18", "24"]
    # as a process leaves it that dies
    (checkpoints / "24").rename(checkpoints / "30.orbax-checkpoint-tmp")
    shutil.copytree(checkpoints / "18", checkpoints / "24")
    for path in (checkpoints / "24").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.rmtree(checkpoints / "18" / "state")  # can be read, but is not what was written
    shutil.copytree(checkpoints / "12" / "state", checkpoints / "18" / "state")

    error = run(tmp_path, *ONE_DEVICE)
    assert "30.orbax-checkpoint-tmp: skipped: it was cut off" in error
    for step in (24, 18):
        assert f"{checkpoints / str(step)}: skipped, using the previous checkpoint" in error
    assert "arrays are not as they were written" in error
    assert_same_run(tmp_path, undisturbed)
    assert checkpoints_of(tmp_path) == ["12", "18", "24", "corrupt-18", "corrupt-24"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--norm-group", "12"],
            "--norm-group 12 does not partition --batch-size 32 on 4 devices of 8 examples",
        ),
        (["--data", "cifar10", "--data-dir", "nowhere"], "nowhere/data_batch_1.bin: not found"),
        (["--data", "cifar10"], "--data cifar10 needs --data-dir"),
        (["--data-dir", "images"], "--data-dir images is for --data cifar10 or folder"),
    ],
)
def test_mistakes_get_one_line(arguments, says, run, tmp_path):
    error = run(tmp_path, *ALONE, *arguments, status=2)
    assert error.startswith("train_resnet: error: ") and says in error and error.count("\n") == 1


@pytest.mark.slow
def test_processes_with_different_arguments_stop_at_the_start(started_apart, tmp_path):
    processes = started_apart(tmp_path, process1=["--learning-rate", "0.3"])
    errors = [process.communicate(timeout=MINUTE)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    says = "train_resnet: error: process 1 has --learning-rate 0.3, process 0 has 0.025"
    assert [line for line in errors[0].splitlines() if "error" in line] == [says]
    assert "error" not in errors[1]


@pytest.mark.slow
def test_another_course_of_training_is_not_continued(run, undisturbed):
    error = run(undisturbed, *ALONE, "--seed", "1", status=2)
    assert "was made with --seed 0, not 1; choose another --out" in error and error.count("\n") == 1


def test_the_launcher_leaves_all_other_arguments():
    assert without_processes(["x", "--processes", "2", "--seed", "1"]) == ["x", "--seed", "1"]
    assert without_processes(["x", "--processes=2", "--seed", "1"]) == ["x", "--seed", "1"]
