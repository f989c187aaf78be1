"""A study: runs with a progress bar, JSON after each, a plot, and measured and reported results.

    class Landscape(Study):
        name, caption = "landscape", "What to see: ..."

        def parts(self):
            return {"batch": Part(steps, self.train_one), ...}

        def claims(self):
            return [Claim("loss along the gradient", "varies less", f"{ratio:.1f} times less")]

        def draw(self, path): ...

    def run(options, interrupt):
        return conduct(Landscape(options), interrupt)

Finished runs are never lost: Ctrl-C ends the study after the current evaluation, shows the results,
and writes them to `--out`, as NAME.json and NAME.png.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
from rich.console import Console
from rich.table import Table

from common import report, session
from common.interrupt import Interrupt
from common.session import Part


class Claim(NamedTuple):
    """A finding, as its source reports it and as it came out here."""

    what: str
    reported: str
    measured: str


class Study:
    """A study. `results` has the results of the finished parts, by name.

    Attributes:
      name: of the program, and of the files that it leaves.
      source: whose findings these are.
      caption: what to see in the plot.
    """

    name: str
    source: str
    caption: str

    def __init__(self, options: Namespace):
        self.options = options
        self.results: dict[str, Any] = {}

    def parts(self) -> Mapping[str, Part]:
        """Returns what there is to run, in turn; reads the data first."""
        raise NotImplementedError

    def claims(self) -> Sequence[Claim]:
        """Returns what can be said so far: `results` may lack any part."""
        raise NotImplementedError

    def tables(self) -> Sequence[Table]:
        """Returns more tables for the terminal than the claims'; `results` may lack any part."""
        return []

    def draw(self, path: Path) -> None:
        """Writes the plot of what there is."""
        raise NotImplementedError

    def content(self, status: str) -> dict[str, Any]:
        """Returns what JSON is to hold."""
        config = session.settings(vars(self.options))
        content = {
            "status": status,
            "config": config,
            **session.environment(),
            "results": self.results,
        }
        claims = self.claims() if self.results else []
        return content | {"source": self.source, "claims": [claim._asdict() for claim in claims]}


def conduct(study: Study, interrupt: Interrupt) -> int:
    """Runs all parts and reports; returns the exit status."""
    return session.guard(
        f"{study.name}.py", study.options.out, lambda: _conduct(study, interrupt, Console())
    )


def _conduct(study: Study, interrupt: Interrupt, console: Console) -> bool:
    out = study.options.out
    parts = study.parts()
    out.mkdir(parents=True, exist_ok=True)
    results = out / f"{study.name}.json"
    report.write_json(results, study.content("running"))

    def keep(name: str, found: Any) -> None:
        study.results[name] = found
        report.write_json(results, study.content("running"))

    finished = session.run_all(parts, interrupt, console, keep)
    report.write_json(results, study.content("finished" if finished else "interrupted"))
    if study.results:
        for table in (*study.tables(), claims_table(study)):
            console.print(table)
        plot = out / f"{study.name}.png"
        study.draw(plot)
        console.print(f"Plot: {plot.resolve()}", soft_wrap=True)
    if not finished:
        console.print(f"Interrupted: {len(study.results)} of {len(parts)} runs are finished.")
    console.print(f"Results: {results.resolve()}", soft_wrap=True)
    return finished


def claims_table(study: Study) -> Table:
    """Returns what the source reports beside what was measured."""
    table = Table(title=f"Reported by {study.source}, and measured here", title_justify="left")
    table.box, table.pad_edge = rich.box.SIMPLE_HEAD, False
    for heading in ("", "reported", "measured"):
        table.add_column(heading)
    for claim in study.claims():
        table.add_row(*claim)
    return table
