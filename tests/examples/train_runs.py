"""Starts the training program in real processes, small; conftest.py imports its fixtures."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
TINY += ["--steps", "24", "--checkpoint-every", "6", "--eval-every", "12", "--log-every", "1"]
TINY += ["--learning-rate", "0.025"]
MINUTE = 60


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Turns off optimizations, so that runs spend little time compiling, and hides PyTorch.

    The program does not need PyTorch; tensorboardX imports it if it can.
    """
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text("raise ImportError('hidden by tests/examples')")
    paths = [str(hidden), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", "JAX_PLATFORMS": "cpu"}
    return os.environ | own | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def start(environment):
    """Starts the program; whatever is left of it ends with the test module."""
    started = []

    def begin(out, *arguments, program=PROGRAM, **options):
        command = [*program, *TINY, "--out", str(out), *map(str, arguments)]
        process = subprocess.Popen(
            command,
            **({"env": environment} | options),
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

    def complete(out, *arguments, status=0, timeout=200, **options):
        process = start(out, *arguments, **options)
        _, error = process.communicate(timeout=timeout)
        assert process.returncode == status, error
        return error

    return complete


@pytest.fixture(scope="module")
def started_apart(start):
    """Starts each process by itself, as a cluster would, without a launcher."""

    def begin(out, count=2, folders=(None, None, None, None), **own):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        place = ["--coordinator", address, "--process-count", count, "--process-index"]
        rest = [own.get(f"process{index}", []) for index in range(count)]
        return [
            start(out, "--devices", 4 // count, *place, index, *rest[index], cwd=folders[index])
            for index in range(count)
        ]

    return begin


def lines(out, split="train"):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def checkpoints_of(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def wait_for(condition, processes, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [
            p.communicate() for p in processes
        ]
        time.sleep(0.02)
