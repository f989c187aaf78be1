"""Runs variants and seeds with a progress bar; Ctrl-C ends it and keeps finished runs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import normjax
from common.data import DataError
from common.interrupt import EXIT_STATUS, Interrupt, Interrupted

# called with the steps since the last evaluation, and the accuracy
Evaluated = Callable[[int, float], None]
# called with the steps since the last time, and a remark for the progress bar
Advance = Callable[[int, str], None]
Run = TypeVar("Run")


class Part(NamedTuple):
    """A run: the number of its steps, and a function that runs them and returns JSON values."""

    steps: int
    work: Callable[[Advance], Any]


def guard(program: str, out: Path, work: Callable[[], bool]) -> int:
    """Returns the exit status of `work`, True if it was finished; a mistake gets one line."""
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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, TextColumn("{task.fields[accuracy]}"), console=console)


def run_all(
    parts: Mapping[str, Part],
    interrupt: Interrupt,
    console: Console,
    finished: Callable[[str, Any], None],
) -> bool:
    """Does what there is to run, in turn, and returns whether it got to the end.

    Args:
      parts: by name.
      interrupt: asked whenever a part advances.
      console: of the progress bar.
      finished: called after each part, with its name and its results.
    """
    width = max(map(len, parts))
    with progress_bar(console) as progress:
        try:
            for name, part in parts.items():
                task = progress.add_task(f"{name:<{width}}", total=part.steps, accuracy="compiling")

                def advance(steps: int, remark: str, task: Any = task) -> None:
                    progress.update(task, advance=steps, accuracy=remark)
                    interrupt.check()

                finished(name, part.work(advance))
        except (Interrupted, KeyboardInterrupt):
            return False
    return True


def by_accuracy(advance: Advance) -> Evaluated:
    """Returns what tells a progress bar of an evaluation: the accuracy, in percent."""
    return lambda steps, accuracy: advance(steps, f"{accuracy:.1%}")


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

    def part(train: Callable[[int, Evaluated], Run]) -> Part:
        return Part(
            seeds * steps,
            lambda advance: [train(seed, by_accuracy(advance)) for seed in range(seeds)],
        )

    parts = {name: part(train) for name, train in variants.items()}
    return run_all(parts, interrupt, console, finished)


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a command line, by name, as JSON has them."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items()
    }


def environment() -> dict[str, Any]:
    """Returns the versions and the machine, as JSON has them."""
    versions = {"python": platform.python_version(), "normjax": normjax.__version__}
    versions |= {"jax": jax.__version__, "optax": optax.__version__}
    machine = {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
    }
    return {"versions": versions, "machine": machine | {"device": jax.devices()[0].device_kind}}
