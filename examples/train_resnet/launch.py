"""Starts several processes of one run on this machine, over loopback, to test cluster runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from train_resnet.ending import say
from train_resnet.signals import LAUNCHER, NAMES

AGAIN = "start again with the same command to continue from the last checkpoint"
PATIENCE = 60  # seconds for processes to exit after another one has failed


def run(processes: int, command: Sequence[str]) -> int:
    """Runs the command in several processes, and returns the first nonzero exit status."""
    address = f"127.0.0.1:{_free_port()}"
    arguments = without_processes(command)
    children: list[subprocess.Popen] = []
    for number in NAMES:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: _send(children, number))
    # Nothing is written to this pipe. It closes with this process, which tells children to stop.
    end, _own = os.pipe()
    for index in range(processes):
        place = ["--process-count", str(processes), "--process-index", str(index)]
        child = subprocess.Popen(
            [sys.executable, *arguments, "--coordinator", address, *place],
            process_group=0,  # Ctrl-C only reaches this process, which passes it on once
            pass_fds=(end,),
            env=os.environ | {LAUNCHER: str(end)},
        )
        children.append(child)
    try:
        return _wait(children)
    finally:
        _send(children, signal.SIGKILL)


def without_processes(command: Sequence[str]) -> list[str]:
    """Returns the command without `--processes N`."""
    kept, drop = [], 0
    for word in command:
        if drop or word.startswith("--processes"):
            drop = 0 if drop or "=" in word else 1
        else:
            kept.append(word)
    return kept


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Waits for all processes; after a first failure, only for a limited time."""
    status, deadline, ended = 0, None, set()
    while len(ended) < len(children):
        for index, child in enumerate(children):
            if index in ended or (code := child.poll()) is None:
                continue
            ended.add(index)
            if code:
                if code < 0:  # otherwise, the process has printed the problem
                    say(f"process {index} was ended by {signal.Signals(-code).name}; {AGAIN}")
                status = status or (128 - code if code < 0 else code)
                deadline = deadline or time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            say(f"ending the remaining processes {PATIENCE} seconds after the first one failed")
            break
        time.sleep(0.1)
    return status


def _send(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
