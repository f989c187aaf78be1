"""Runs of several variants and seeds behind a progress bar, which Ctrl-C ends without losing any that is finished."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import normjax
from common.data import DataError
from common.interrupt import EXIT_STATUS, Interrupt, Interrupted

Evaluated = Callable[[int, float], None]  # called with the steps since the last evaluation, and the accuracy
Run = TypeVar("Run")


def guard(program: str, out: Path, work: Callable[[], bool]) -> int:
    """Returns the exit status of `work`, which says whether it got to the end; a mistake gets one line."""
    try:
        return 0 if work() else EXIT_STATUS
    except DataError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or out}: {error.strerror}"
    except (Interrupted, KeyboardInterrupt):
        return EXIT_STATUS
    print(f"{program}: error: {message}", file=sys.stderr)
    return 1


def progress_bar(console: Console) -> Progress:
    """Returns a bar whose tasks have a field `accuracy`."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TextColumn("{task.fields[accuracy]}"), console=console)


def train_all(
    variants: Mapping[str, Callable[[int, Evaluated], Run]],
    seeds: int,
    steps: int,
    interrupt: Interrupt,
    console: Console,
    finished: Callable[[str, list[Run]], None],
) -> bool:
    """Trains each variant with each seed and returns whether it got to the end.

    Args:
      variants: by name, what trains one with a seed, and reports its evaluations.
      seeds: how many, from 0.
      steps: of each run.
      interrupt: asked after each evaluation.
      console: of the progress bar.
      finished: called after each variant, with its name and a run for each seed.
    """
    width = max(map(len, variants))
    with progress_bar(console) as progress:
        try:
            for name, train in variants.items():
                task = progress.add_task(f"{name:<{width}}", total=seeds * steps, accuracy="compiling")

                def evaluated(steps: int, accuracy: float, task: Any = task) -> None:
                    progress.update(task, advance=steps, accuracy=f"{accuracy:.1%}")
                    interrupt.check()

                finished(name, [train(seed, evaluated) for seed in range(seeds)])
        except (Interrupted, KeyboardInterrupt):
            return False
    return True


def environment() -> dict[str, Any]:
    """Returns the versions and the machine, as JSON has them."""
    versions = {"python": platform.python_version(), "normjax": normjax.__version__}
    versions |= {"jax": jax.__version__, "optax": optax.__version__}
    machine = {"platform": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()}
    return {"versions": versions, "machine": machine | {"device": jax.devices()[0].device_kind}}
