"""A study: runs with a progress bar, JSON after each, a plot, and measured and reported results.

    class Landscape(Study):
        name, source, caption = "landscape", "whose findings", "What to see: ..."

        def parts(self):
            return {"batch": Part(steps, self.train_one), ...}

        def claims(self):
            return [Claim("loss along the gradient", "varies less", f"{ratio:.1f} times less")]

        def draw(self, path): ...

Finished runs are never lost: Ctrl-C ends the study after the current evaluation, shows the results,
and writes them to `--out`, as NAME.json and NAME.png.
"""

import os
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import optax
import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import normjax
from common.data import DataError, MissingData
from common.interrupt import EXIT_STATUS, Interrupt, Interrupted
from common.report import write_json
from common.results import medians

# Called with the steps since the last time, and a remark for the progress bar.
Advance = Callable[[int, str], None]


class Part(NamedTuple):
    """A run: the number of its steps, and a function that runs them and returns JSON values."""

    steps: int
    work: Callable[[Advance], Any]


class Claim(NamedTuple):
    """A finding, as its source reports it and as it came out here."""

    what: str
    reported: str
    measured: str


class Study:
    """A study. `results` has the results of the finished parts, by name.

    Attributes:
      name: of the program, and of the files that it leaves.
      source: whose findings these are; None without claims.
      caption: what to see in the plot.
      unit: what its parts are, in the plural.
    """

    name: str
    source: str | None = None
    caption: str
    unit = "runs"

    def __init__(self, options: Namespace):
        self.options = options
        self.results: dict[str, Any] = {}

    def parts(self) -> Mapping[str, Part]:
        """Returns what there is to run, in turn; reads the data first."""
        raise NotImplementedError

    def each_seed(self, run: Callable[[int, Advance], Any]) -> Part:
        """Returns a part that calls `run(seed, advance)` for each of `--seeds`."""
        seeds, steps = self.options.seeds, self.options.steps
        return Part(seeds * steps, lambda advance: [run(seed, advance) for seed in range(seeds)])

    def seeds_apart(self, run: Callable[[int, Advance], Any]) -> Mapping[str, Part]:
        """Returns a part for each of `--seeds`."""
        parts = {f"seed {seed}": partial(run, seed) for seed in range(self.options.seeds)}
        return {name: Part(self.options.steps, work) for name, work in parts.items()}

    def curve(self, name: str, *keys: str) -> list[float]:
        """Returns the medians over the seeds of a part of a list that each run has under keys."""
        return medians([reduce(getitem, keys, run) for run in self.results[name]])

    def along(self, name: str, settings: Iterable[float], key: str) -> dict[float, float]:
        """Returns the medians over the seeds of finished parts "name, setting", by setting."""
        results = {setting: self.results.get(f"{name}, {setting:g}") for setting in settings}
        return {setting: median(result[key]) for setting, result in results.items() if result}

    def claims(self) -> Sequence[Claim]:
        """Returns what can be said so far: `results` may lack any part."""
        return []

    def tables(self) -> Iterable[Table | str]:
        """Returns what else to print; `results` may lack any part."""
        return []

    def draw(self, path: Path) -> None:
        """Writes the plot of what there is."""

    def interrupted(self, parts: int) -> str:
        """Returns how much is finished."""
        return f"{len(self.results)} of {parts} {self.unit} are finished."

    def content(self) -> dict[str, Any]:
        """Returns the results as JSON has them."""
        claims = [claim._asdict() for claim in self.claims()] if self.results else []
        return {"results": self.results, "source": self.source, "claims": claims}

    def save(self, status: str) -> None:
        """Writes all there is so far as JSON."""
        config = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.options).items()
        }
        content = {"status": status, "config": config, **environment(), **self.content()}
        write_json(self.options.out / f"{self.name}.json", content)


def conduct(study: Study, interrupt: Interrupt) -> int:
    """Runs all parts and reports; returns the exit status. A mistake gets one line."""
    status = 1
    try:
        return 0 if _conduct(study, interrupt, Console()) else EXIT_STATUS
    except (Interrupted, KeyboardInterrupt):
        return EXIT_STATUS
    except MissingData as error:
        status, message = 2, str(error)
    except DataError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or study.options.out}: {error.strerror}"
    print(f"{study.name}.py: error: {message}", file=sys.stderr)
    return status


def _conduct(study: Study, interrupt: Interrupt, console: Console) -> bool:
    parts = study.parts()
    study.options.out.mkdir(parents=True, exist_ok=True)
    study.save("running")
    finished = _run_all(study, parts, interrupt, console)
    study.save("finished" if finished else "interrupted")
    if study.results:
        for shown in study.tables():
            console.print(shown)
        if study.source:
            claims = f"Reported by {study.source}, and measured here"
            console.print(table(("", "reported", "measured"), study.claims(), 3, claims, wrap=True))
        plot = study.options.out / f"{study.name}.png"
        study.draw(plot)
        if plot.exists():
            console.print(f"Plot: {plot.resolve()}", soft_wrap=True)
    if not finished:
        console.print(f"Interrupted: {study.interrupted(len(parts))}")
    results = study.options.out / f"{study.name}.json"
    console.print(f"Results: {results.resolve()}", soft_wrap=True)
    return finished


def _run_all(
    study: Study, parts: Mapping[str, Part], interrupt: Interrupt, console: Console
) -> bool:
    """Runs the parts in turn and returns whether it got to the end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    remarks = TimeElapsedColumn(), TextColumn("{task.fields[remark]}")
    with Progress(*columns, *remarks, console=console) as progress:
        try:
            for name, part in parts.items():
                label = f"{name:<{max(map(len, parts))}}"
                task = progress.add_task(label, total=part.steps, remark="compiling")

                def advance(steps: int, remark: str, task: Any = task) -> None:
                    progress.update(task, advance=steps, remark=remark)
                    interrupt.check()

                study.results[name] = part.work(advance)
                study.save("running")
        except (Interrupted, KeyboardInterrupt):
            return False
    return True


def environment() -> dict[str, Any]:
    """Returns the versions and the machine, as JSON has them."""
    versions = {"python": platform.python_version(), "normjax": normjax.__version__}
    versions |= {"jax": jax.__version__, "optax": optax.__version__}
    machine = {"platform": platform.platform(), "processor": platform.machine()}
    machine |= {"cpus": os.cpu_count(), "device": jax.devices()[0].device_kind}
    return {"versions": versions, "machine": machine}


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: int = 1,
    title: str | None = None,
    wrap: bool = False,
    **style: Any,
) -> Table:
    """Returns a table: the first `left` columns have text, the others numbers."""
    made = Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False, **style
    )
    for i, heading in enumerate(headings):
        text = i < left
        made.add_column(heading, justify="left" if text else "right", no_wrap=text and not wrap)
    for row in rows:
        made.add_row(*row)
    return made
