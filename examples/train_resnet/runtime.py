"""Connects processes and devices, and reports errors as one line and an exit status."""

from __future__ import annotations

import socket
import sys
import traceback
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging
from common.data import DataError
from jax.sharding import Mesh

from train_resnet.ending import (
    DIVERGED,
    FAILED,
    LOST,
    MISTAKE,
    LastWords,
    complain,
    first_line,
    leave,
    say,
)
from train_resnet.options import Options
from train_resnet.signals import Stop
from train_resnet.steps import AXIS, SetupError
from train_resnet.watchdog import progress

ENDED = "was ended by a signal, or by JAX's runtime because another process is gone (see above)"
UNANSWERED = "stopped, because devices of another process do not respond; it may have died"
APART = (
    "failed; all processes need the same --coordinator and --process-count, and each its own "
    "--process-index"
)
AGAIN = "Start all processes again with the same command to continue from the last checkpoint"
START = 60  # seconds for which processes wait for each other at the start
GLOO = 30  # seconds after which gloo's collectives between CPUs time out; not configurable


def guard(options: Options, stop: Stop) -> int:
    """Trains, and returns the exit status; prints one line for an error."""
    progress.watch(options.stall)
    sys.unraisablehook = _unraisable
    connect(options)
    several = jax.process_count() > 1
    words = LastWords(f"process {jax.process_index()} {ENDED}. {AGAIN}") if several else None
    from train_resnet.checkpoints import SaveError
    from train_resnet.loop import DivergedError, run

    try:
        return run(options, stop)
    except (SetupError, DivergedError) as error:
        # All processes arrive here together, so they can disconnect from each other.
        if jax.process_index() == 0:
            complain(str(error))
        return MISTAKE if isinstance(error, SetupError) else DIVERGED
    except (SaveError, DataError) as error:
        status, message = FAILED, str(error)
    except jax.errors.JaxRuntimeError as error:
        where = f"process {jax.process_index()} {UNANSWERED}" if several else progress.stage
        status, message = LOST, f"{where}: {first_line(error)}. {AGAIN}"
    except OSError as error:
        status, message = FAILED, f"{error.filename or options.out}: {error.strerror or error}"
    except Exception as error:
        complain(f"process {jax.process_index()}: {type(error).__name__}: {first_line(error)}")
        traceback.print_exception(error)
        status, message = FAILED, f"ended by this {type(error).__name__}; {progress.saved}"
    finally:
        if words is not None:
            words.take_back()
    leave(status, message)


def _unraisable(error: Any) -> None:
    """Prints an unraisable error, unless TensorStore raised it after a failed write.

    TensorStore then calls an event loop that Orbax has closed, once for each array.
    """
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def connect(options: Options) -> None:
    """Connects to the other processes, if there are any."""
    # Orbax and grain log errors with tracebacks, in addition to raising them.
    logging.set_verbosity(logging.FATAL)
    # The program counts votes itself, see loop.py; JAX's service would handle SIGTERM itself.
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
        _meet(options, join)
    elif options.distributed and options.devices is None:
        progress.now("detecting a cluster, and waiting for its other processes", START)
        try:
            join()
        except ValueError as error:
            # JAX detects no cluster, so this is one process with all devices of this machine.
            if "coordinator_address" not in str(error):
                problem = f"the description of the cluster is incomplete: {first_line(error)}"
                leave(MISTAKE, f"{problem} (or --no-distributed)")
    progress.now("starting the devices")
    if jax.process_count() > 1 and jax.default_backend() == "cpu" and options.heartbeat > GLOO:
        if jax.process_index() == 0:
            say(
                f"note: on CPUs, gloo times out after {GLOO} seconds, "
                f"not --heartbeat {options.heartbeat}"
            )


def _meet(options: Options, join: partial[None]) -> None:
    """Connects to the other processes at `--coordinator`, where process 0 listens."""
    assert options.coordinator is not None
    process = f"process {options.process_index} of {options.process_count}"
    where = f"{process} connects to the others at {options.coordinator}"
    if options.process_index == 0:
        _check_port(options.coordinator)
    say(f"{where} within {START} seconds")
    progress.now(f"waiting for the other processes at {options.coordinator}", START)
    words = LastWords(f"{where}: {APART}")
    try:
        join(options.coordinator, options.process_count, options.process_index)
    except (RuntimeError, ValueError) as error:
        problem = f"no connection to the coordinator, {options.coordinator}: {first_line(error)}"
        leave(LOST, problem)
    words.take_back()


def _check_port(address: str) -> None:
    """Exits if the port is in use, which would be a segmentation fault in JAX's service."""
    port = address.rpartition(":")[2]
    if not port.isdigit():
        leave(MISTAKE, f"--coordinator {address}: expected HOST:PORT")
    try:
        socket.create_server(("", int(port))).close()
    except (OSError, OverflowError) as error:
        leave(
            MISTAKE, f"--coordinator {address}: process 0 cannot listen there: {first_line(error)}"
        )


def mesh() -> Mesh:
    """Returns all devices by process; raises SetupError if their numbers differ."""
    counts = [len(jax.local_devices(process_index=index)) for index in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise SetupError(
            f"the processes have different numbers of devices: {', '.join(map(str, counts))}"
        )
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (AXIS,))
