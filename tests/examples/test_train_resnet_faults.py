"""Each row of the table of faults in the training program's README, in real processes."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_runs import MINUTE, PROGRAM, ROOT, checkpoints_of, lines, wait_for

pytestmark = pytest.mark.slow
LONG = ["--steps", "4000", "--checkpoint-every", "2", "--eval-every", "4000"]
AN_END = 5 * MINUTE  # of a process that has been told to; guards against a hang only


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of images in folders."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, size in (("train", 48), ("val", 20)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(size):
                pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def of(folder):
    return ["--data", "folder", "--data-dir", folder, "--devices", 1]


def group_of(process):
    """The processes of a group that are running, by index; loaders name their parent's pipe."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_text()
        except OSError:
            continue
        if int(state[2]) == process.pid and state[0] != "Z":
            found[int(path.name)] = command
    return found


def loaders_of(process):
    return [pid for pid, command in group_of(process).items() if "spawn_main" in command]


def wait_until_gone(process):
    """No loader, no shell and no tracker outlives the program."""
    deadline = time.monotonic() + MINUTE
    while group_of(process):
        assert time.monotonic() < deadline, group_of(process)
        time.sleep(0.05)


def end_of(process, status):
    """Standard error of a process that ends with a status; none of it is a traceback."""
    _, error = process.communicate(timeout=AN_END)
    assert process.returncode == status, error
    assert "Traceback" not in error
    wait_until_gone(process)
    return error


def has_steps(out, number):
    return (out / "metrics.jsonl").exists() and len(lines(out)) >= number


def contents(out):
    """All files of a run and their bytes, but for the lock, which says who came last."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def interrupted(start, images, tmp_path_factory):
    """A run that a Ctrl-C to its whole group has ended, its loaders included: folder and error."""
    out = tmp_path_factory.mktemp("interrupted")
    process = start(out, *of(images), *LONG, "--workers", 2)
    wait_for(partial(has_steps, out, 8), [process])
    assert len(loaders_of(process)) == 2
    os.killpg(process.pid, signal.SIGINT)
    return out, end_of(process, 130)


def test_ctrl_c_to_the_whole_group_saves(interrupted):
    out, error = interrupted
    assert re.fullmatch(
        r"train_resnet: Ctrl-C: will save and end after .* \(for \d+ s\);.*\n", error
    )
    last = lines(out)[-1]["step"]
    assert (out / "checkpoints" / str(last) / "SHA256SUMS").exists()


def damaged(folder):
    """Yields ways to damage each file of a checkpoint: a name, and what to do in a copy of it."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = path.relative_to(folder), path.stat().st_size
        content = path.read_bytes()
        flipped = bytes([content[0] ^ 1]) + content[1:]
        yield name, lambda copy: copy.unlink()
        for new in (content[: size // 2], bytes(size), flipped, content[:-1] + b"?"):
            yield name, lambda copy, new=new: copy.write_bytes(new)


def test_no_damage_of_any_file_stops_a_restart(interrupted, start, images, tmp_path):
    """Then a process that loads data is killed: it is named."""
    shutil.copytree(interrupted[0], tmp_path, dirs_exist_ok=True)
    folder, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    good = max(int(name) for name in checkpoints_of(tmp_path))
    before = metrics.read_bytes()
    metrics.write_bytes(before + b'5\n{"step": "x"}\n\xff\xfe\n{"step": 8, "lo')
    number = 10_000
    for name, damage in damaged(folder / str(good)):
        number += 1
        shutil.copytree(folder / str(good), folder / str(number))
        damage(folder / str(number) / name)
    (folder / "1.orbax-checkpoint-tmp").mkdir()

    process = start(tmp_path, *of(images), *LONG, "--workers", 2)
    wait_for(lambda: len(lines_in_full(metrics)) >= len(before.splitlines()) + 3, [process])
    os.kill(loaders_of(process)[0], signal.SIGKILL)
    error = end_of(process, 1)

    assert number >= 10_080
    for step in range(10_001, number + 1):
        assert f"{folder / str(step)}: skipped, using the previous checkpoint: files of" in error
        assert (folder / f"corrupt-{step}").is_dir()
    assert f"{folder / '1.orbax-checkpoint-tmp'}: skipped: it was cut off" in error
    assert "a process that loads data (--workers) has died" in error.splitlines()[-1]
    assert error.count("\n") == number - 10_000 + 2
    assert metrics.read_bytes().startswith(before)
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > good
    dropped = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert len(dropped) == 4 and all("damaged" in json.loads(line) for line in dropped)


def lines_in_full(path):
    return [line for line in path.read_bytes().splitlines() if line.endswith(b"}")]


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """The program with one more layer."""
    examples = tmp_path_factory.mktemp("edited") / "examples"
    for name in ("train_resnet", "common"):
        shutil.copytree(ROOT / "examples" / name, examples / name)
    network = examples / "train_resnet" / "resnet.py"
    last = 'return nn.Dense(self.classes, name="logits")(x)'
    assert last in network.read_text()
    more = 'return nn.Dense(self.classes, name="more")(' + last.removeprefix("return ") + ")"
    network.write_text(network.read_text().replace(last, more))
    return [sys.executable, str(examples / "train_resnet")]


def test_a_checkpoint_of_another_program_is_not_touched(interrupted, run, images, edited):
    out = interrupted[0]
    before = contents(out)
    error = run(out, *of(images), *LONG, program=edited, status=2)
    assert "is of another program: it has no params/more/bias float32[2] (and " in error
    assert error.startswith("train_resnet: error: ") and error.count("\n") == 1
    assert contents(out) == before


def test_checkpoints_of_an_earlier_version_are_not_touched(interrupted, run, images, tmp_path):
    """They have no checksums, and nobody has damaged them."""
    out = tmp_path / "earlier"
    shutil.copytree(interrupted[0], out)
    for sums in (out / "checkpoints").glob("*/SHA256SUMS"):
        sums.unlink()
    before = contents(out)
    error = run(out, *of(images), *LONG, status=2)
    assert "has no SHA256SUMS: an earlier version" in error and error.count("\n") == 1
    assert contents(out) == before


def test_data_that_have_changed_since_are_noticed(interrupted, run, images, tmp_path):
    out = interrupted[0]
    shutil.copytree(images, tmp_path / "images")
    for i in range(20):
        (tmp_path / "images" / "train" / "cat" / f"{i}.png").unlink()
    before = contents(out)
    error = run(out, *of(tmp_path / "images"), *LONG, status=2)
    assert f"the data are not those of {out}" in error and "training images: 76, not 96" in error
    assert error.count("\n") == 1 and contents(out) == before


def test_a_folder_in_use_is_left_alone(interrupted, run, images):
    out = interrupted[0]
    before = contents(out)
    with (out / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        error = run(out, *of(images), *LONG, status=2)
    assert re.fullmatch(rf"train_resnet: error: {out} is in use by process \d+ on .*\n", error)
    assert contents(out) == before


def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(run, tmp_path):
    diverging = ["--devices", 1, "--steps", 6, "--learning-rate", "1e30", "--warmup", 0]
    diverging += ["--checkpoint-every", 1, "--keep", 1]
    error = run(tmp_path, *diverging, status=4)
    steps = [line["step"] for line in lines(tmp_path)]
    (finite,) = checkpoints_of(tmp_path)
    assert f"is nan after step {steps[-1]}; the last checkpoint is of step {finite}" in error
    assert error.count("\n") == 1 and lines(tmp_path)[-1]["loss"] is None

    error = run(tmp_path, *diverging, "--allow-nan", "--eval-every", 100)
    assert "going on, as --allow-nan says" in error and error.count("\n") == 1
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 7))
    assert checkpoints_of(tmp_path) == sorted([finite, "6"])


def test_a_full_disk_ends_the_run_with_a_line(start, environment, tmp_path):
    """A limit on the size of files stands for the full disk: writing fails alike."""
    # or the limit would cut off programs in the suite's cache
    unwritten = environment | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}

    small_files = ["sh", "-c", 'ulimit -f 16 && exec "$@"', "sh", *PROGRAM]  # 16 half kB
    process = start(tmp_path, "--devices", 1, program=small_files, env=unwritten)
    (error,) = end_of(process, 1).splitlines()
    assert "a checkpoint cannot be written: File too large; no checkpoint is written" in error


def test_a_port_in_use_is_named(run, tmp_path):
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        place = ["--coordinator", address, "--process-count", 2, "--process-index", 0]
        error = run(tmp_path, *place, status=2)
    assert error.startswith(
        f"train_resnet: error: --coordinator {address}: process 0 cannot listen"
    )
    assert "in use" in error and error.count("\n") == 1


def test_hosts_whose_data_differ_are_named(started_apart, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "dog" / "3.png").unlink()
    roots = {"process0": of(images)[:4], "process1": of(tmp_path / "images")[:4]}
    processes = started_apart(tmp_path / "run", **roots)
    errors = [end_of(process, 2).splitlines()[-1] for process in processes]
    says = "the data of process 1 are not those of process 0: training images: 95, not 96"
    assert errors[0] == f"train_resnet: error: {says}"


def test_a_folder_that_hosts_do_not_share_is_named(started_apart, tmp_path):
    """Each process sees another folder under one name, as hosts do with their own disks."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    processes = started_apart("/proc/self/cwd/run", folders=folders)
    errors = [end_of(process, 2).splitlines()[-1] for process in processes]
    assert "process 1 does not see the /proc/self/cwd/run of process 0" in errors[0]


def test_sigterm_is_answered_while_others_are_awaited(start, tmp_path):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
    place = ["--coordinator", f"127.0.0.1:{port}", "--process-count", 2, "--process-index", 0]
    process = start(tmp_path, "--devices", 1, *place)
    assert "connects to the others" in process.stderr.readline()
    time.sleep(1)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    error = end_of(process, 0)
    assert time.monotonic() - sent < 30  # of 60 that it would wait
    assert "SIGTERM: ended while waiting for the other processes at" in error


def test_ctrl_c_is_answered_while_compiling(start, tmp_path):
    """It never ends compiling, and so finds nothing in the suite's cache the next time."""
    process = start(tmp_path, "--devices", 1, "--network", "resnet50")
    assert "Sharing" not in (greeting := process.stdout.readline())
    assert "16 examples of a device share statistics" in greeting
    time.sleep(3)  # for the first images
    process.send_signal(signal.SIGINT)
    assert "will save and end after compiling the training step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert "a second Ctrl-C: ended at once while compiling" in end_of(process, 130)


def test_processes_end_with_their_launcher(start, tmp_path):
    process = start(tmp_path, *LONG, "--processes", 2, "--devices", 1)
    wait_for(partial(has_steps, tmp_path, 3), [process])
    process.kill()
    _, error = process.communicate(timeout=AN_END)  # until both have closed it
    assert error.count("the launcher is gone: will save and end after") == 2, error
    assert "Traceback" not in error
    last = lines(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / str(last)).is_dir()


def test_a_process_that_hangs_ends_the_others(started_apart, tmp_path):
    """It is stopped: it holds its connections, and answers nothing."""
    patient = [*LONG, "--stall", 10]
    processes = started_apart(tmp_path, process0=patient, process1=patient)
    wait_for(partial(has_steps, tmp_path, 3), processes)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(1)
    processes[0].send_signal(signal.SIGTERM)
    error = end_of(processes[0], 3)
    assert "SIGTERM: will save and end after" in error
    assert "no progress for 10 seconds (--stall): " in error.splitlines()[-1]
