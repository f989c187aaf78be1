"""Checks before the first step that all processes agree; none trains if one differs.

Processes wait for each other at JAX's coordination service before devices communicate. gloo, which
runs collectives between CPUs, times out after 30 seconds, and a host may take longer to list its
images or to compile.
"""

from __future__ import annotations

import itertools
import json
import shutil
from typing import Any

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import normjax
from train_resnet import lock
from train_resnet.digest import Facts, difference
from train_resnet.options import Options
from train_resnet.steps import SetupError
from train_resnet.watchdog import COMPILING

_meetings = itertools.count()


def agree(options: Options, problem: str | None, facts: Facts, token: str | None) -> None:
    """Raises SetupError in all processes if one has a problem or differs from the others.

    Args:
      options: the options of this process.
      problem: a problem of this process, such as a missing file.
      facts: facts about the data, see digest.py.
      token: in process 0, the token of the lock in `--out`, which all processes must see there.
    """
    packages = (jax, flax, optax, normjax)
    versions = {package.__name__: package.__version__ for package in packages}
    flags = options.shared() | {"process_count": options.process_count}
    own = {"problem": problem and problem[:2000], "options": flags, "versions": versions}
    told = tell(options, own | {"facts": facts, "token": token})
    for index, other in enumerate(told):
        _compare(index, other, told)
    _same_folder(options, told[0]["token"])


def _compare(index: int, other: dict, told: list[dict]) -> None:
    """Raises SetupError if a process has a problem or differs from process 0."""
    if other["problem"] is not None:
        raise SetupError(of_process(index, other["problem"]))
    for kind in ("options", "versions"):
        for name, value in other[kind].items():
            if value != (first := told[0][kind][name]):
                flag = f"--{name.replace('_', '-')}" if kind == "options" else name
                raise SetupError(f"process {index} has {flag} {value}, process 0 has {first}")
    if (different := difference(other["facts"], told[0]["facts"])) is not None:
        raise SetupError(f"the data of process {index} are not those of process 0: {different}")


def _same_folder(options: Options, token: str) -> None:
    """Raises SetupError unless all processes see the same `--out`."""
    seen = [told["seen"] for told in tell(options, {"seen": lock.sees(options.out, token)})]
    if not all(seen):
        raise SetupError(
            f"process {seen.index(False)} does not see the {options.out} of process 0: --out has "
            "to be on a file system that all hosts share"
        )


def room(options: Options, state: Any) -> None:
    """Raises SetupError in all processes if the checkpoints will not fit on the disk."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    found = len([path for path in options.out.glob("checkpoints/*") if path.name.isdigit()])
    # Orbax deletes the oldest checkpoint after it has written the next one.
    needed, free = size * max(1, options.keep + 1 - found), shutil.disk_usage(options.out).free
    problem = None
    if free < needed:
        problem = (
            f"{options.out}: {free / 1e6:,.0f} MB are free, and checkpoints (--keep "
            f"{options.keep}) need {needed / 1e6:,.0f} MB more"
        )
    for index, other in enumerate(tell(options, {"problem": problem})):
        if other["problem"] is not None:
            raise SetupError(of_process(index, other["problem"]))


def of_process(index: int, message: str) -> str:
    """Returns a message with the index of its process, if there are several."""
    return message if jax.process_count() == 1 else f"process {index}: {message}"


def meet(options: Options, name: str) -> None:
    """Waits for all processes, however long they compile; only the watchdog limits this."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(
            f"train_resnet_{next(_meetings)}_{name}",
            timeout=COMPILING * options.stall,
            processes=set(range(jax.process_count())),
        )


def tell(options: Options, content: dict) -> list[dict]:
    """Returns the message of each process, in order."""
    if jax.process_count() == 1:
        return [content]
    meet(options, "tell")
    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).reshape(-1)
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(gathered, sizes, strict=True)]
