"""Connects processes and devices, checks that they agree, and ends all when one is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from functools import partial
from types import FrameType
from typing import NoReturn

import flax
import jax
import numpy as np
import optax
from common.data import DataError
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import normjax
from train_resnet.options import Options
from train_resnet.steps import AXIS, SetupError

MISTAKE, LOST = 2, 3  # exit statuses
ROOM = 8192  # bytes of what a process tells the others at the start
ENDED = (
    "was ended, by JAX's runtime as another process is gone (then it says so above), or by a signal"
)
UNANSWERED = "stopped, as devices of another process do not answer, which may have died"
APART = (
    "not so; all processes need the same --coordinator and --process-count, and a --process-index "
    "of their own"
)
AGAIN = "Start all processes again with the same command to go on from the last checkpoint"
START = 60  # seconds that processes wait for each other at the start


class Stop:
    """Lets the loop ask between steps for SIGTERM or Ctrl-C; a second Ctrl-C acts at once."""

    number: int | None = None

    def listen(self) -> None:
        """Has the signals noted from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    @property
    def status(self) -> int:
        """The exit status: an order to end is obeyed with 0, Ctrl-C is not success."""
        return 128 + signal.SIGINT if self.number == signal.SIGINT else 0


class LastWords:
    """A line that is printed if this process ends without taking it back.

    JAX's runtime ends a process by itself, from C++, when another one is gone, and SIGKILL ends one
    without a word. So a shell waits for the end of a pipe that ends with this process.
    """

    def __init__(self, message: str):
        command = [
            "sh",
            "-c",
            'read -r end || printf "%s\\n" "$0" >&2',
            f"train_resnet: error: {message}",
        ]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def take_back(self) -> None:
        """Has nothing printed."""
        self._shell.communicate(b"end\n")


def guard(options: Options) -> int:
    """Trains and returns the exit status; what goes wrong gets one line."""
    stop = Stop()
    stop.listen()
    connect(options)
    stop.listen()  # again: JAX may have taken SIGTERM for itself
    several = jax.process_count() > 1
    words = LastWords(f"process {jax.process_index()} {ENDED}. {AGAIN}") if several else None
    try:
        from train_resnet import loop

        return loop.run(options, stop)
    except SetupError as error:
        # All processes come here together, so that they can say good-bye to each other.
        if jax.process_index() == 0:
            _say(str(error))
        return MISTAKE
    except Exception as error:
        if not several and not isinstance(error, DataError | OSError):
            raise
        failure = error
    finally:
        if words is not None:
            words.take_back()
    _leave(*_describe(failure, options))


def _describe(error: Exception, options: Options) -> tuple[int, str]:
    """Returns the exit status and the line for an error."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return LOST, f"process {jax.process_index()} {UNANSWERED}: {_first_line(error)}. {AGAIN}"
    if isinstance(error, DataError):
        return 1, str(error)
    if isinstance(error, OSError) and error.strerror:
        return 1, f"{error.filename or options.out}: {error.strerror}"
    traceback.print_exception(error)
    return 1, f"process {jax.process_index()}: {_first_line(error)}"


def connect(options: Options) -> None:
    """Joins the other processes, where there are any."""
    # The program counts votes itself, see loop.py; JAX's service would have SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if options.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    join = partial(
        jax.distributed.initialize,
        initialization_timeout=START,
        heartbeat_timeout_seconds=options.heartbeat,
    )
    if options.coordinator is not None:
        process = f"process {options.process_index} of {options.process_count}"
        where = f"{process} meets the others at {options.coordinator}"
        print(f"train_resnet: {where} within {START} seconds", file=sys.stderr, flush=True)
        words = LastWords(f"{where}: {APART}")
        try:
            join(options.coordinator, options.process_count, options.process_index)
        except (RuntimeError, ValueError) as error:
            words.take_back()
            _leave(
                LOST,
                f"no connection to the coordinator, {options.coordinator}: {_first_line(error)}",
            )
        words.take_back()
    elif options.distributed and options.devices is None:
        try:
            join()
        except ValueError as error:
            # No cluster that JAX knows: one process with all devices of this machine.
            if "coordinator_address" not in str(error):
                _leave(
                    MISTAKE,
                    f"a cluster that is not described in full: {_first_line(error)} "
                    "(or --no-distributed)",
                )


def mesh() -> Mesh:
    """Returns all devices by process; raises SetupError if some processes have more than others."""
    counts = [len(jax.local_devices(process_index=index)) for index in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise SetupError(
            f"the processes have unequal numbers of devices: {', '.join(map(str, counts))}"
        )
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (AXIS,))


def agree(options: Options, problem: str | None) -> None:
    """Raises SetupError in all processes if one has a problem, or other options or versions."""
    versions = {package.__name__: package.__version__ for package in (jax, flax, optax, normjax)}
    flags = options.shared() | {"process_count": options.process_count}
    own = {"problem": problem and problem[:2000], "options": flags, "versions": versions}
    told = tell(own)
    for index, other in enumerate(told):
        if other["problem"] is not None:
            where = f"process {index}: " if len(told) > 1 else ""
            raise SetupError(where + other["problem"])
        for kind in ("options", "versions"):
            for name, value in other[kind].items():
                if value != (first := told[0][kind][name]):
                    flag = f"--{name.replace('_', '-')}" if kind == "options" else name
                    raise SetupError(f"process {index} has {flag} {value}, process 0 has {first}")


def tell(content: dict) -> list[dict]:
    """Returns what each process tells, in their order."""
    if jax.process_count() == 1:
        return [content]
    text = json.dumps(content).encode()
    padded = np.zeros(ROOM, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in gathered]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _say(message: str) -> None:
    print(f"train_resnet: error: {message}", file=sys.stderr, flush=True)


def _leave(status: int, message: str) -> NoReturn:
    """Ends this process at once: an orderly end would wait for processes that are gone."""
    _say(message)
    sys.stdout.flush()
    os._exit(status)
