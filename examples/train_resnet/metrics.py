"""Output of a run: a progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

DROPPED = "metrics.dropped.jsonl"  # lines of steps that are taken again, see `forget`


class Metrics:
    """Where process 0 reports; in the others all of it does nothing."""

    def __init__(self, folder: Path, steps: int, start: int, batch_size: int, active: bool):
        self.active, self.steps, self.batch_size = active, steps, batch_size
        self.console = Console(quiet=not active)
        if not active:
            return
        # here, because this takes a second that no other process needs
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        forget(self.path, start)
        self.file = self.path.open("a", buffering=1)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        fields = TimeRemainingColumn(), TextColumn("{task.fields[shown]}")
        self.progress = Progress(
            *columns, *fields, console=self.console, disable=not self.console.is_terminal
        )
        self.task = self.progress.add_task(
            "training", total=steps, completed=start, shown="compiling"
        )
        self.progress.start()
        self.before: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None

    def trained(self, step: int, values: dict[str, float], finished: float) -> None:
        """Reports a finished step of training, and the images per second since the last one."""
        if not self.active:
            return
        # Two steps that were seen to be finished at once have the rate of both together.
        if self.last is not None and finished > self.last[1]:
            self.before = self.last
        self.last = step, finished
        if self.before is not None:
            images = (step - self.before[0]) * self.batch_size
            values["images_per_second"] = images / (finished - self.before[1])
        self._write(step, "train", values)
        shown = f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.1%}"
        if "images_per_second" in values:
            shown += f"  {values['images_per_second']:,.0f} images/s"
        self.progress.update(self.task, completed=step, shown=shown)
        self._print(step, shown)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Reports an evaluation."""
        if not self.active:
            return
        self.before = self.last = None  # its time is not training
        self._write(step, "test", values)
        self.say(f"step {step}: test accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f}")

    def say(self, message: str) -> None:
        """Prints a line; a run goes on when nobody reads them any more."""
        try:
            self.console.print(message, soft_wrap=True, highlight=False)
        except OSError:
            self.console.quiet = True

    def close(self) -> None:
        """Writes what is left to write."""
        if self.active:
            self.progress.stop()
            self.file.close()
            self.board.close()

    def _print(self, step: int, shown: str) -> None:
        if not self.console.is_terminal:
            self.say(f"step {step}/{self.steps}: {shown}")

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "split": split, **plain}, allow_nan=False) + "\n")
        for name, value in plain.items():
            if value is not None:
                self.board.add_scalar(f"{split}/{name}", value, step)


def forget(path: Path, start: int) -> None:
    """Moves lines after the step that a run goes on from to another file: they come once more.

    So do lines that are damaged, such as one that a dying process left unfinished.
    """
    if not path.exists():
        return
    kept, moved = [], []
    for text in path.read_text(errors="replace").splitlines():
        line = _line(text)
        if line is not None and line["step"] <= start:
            kept.append(text)
        else:
            moved.append(json.dumps({"damaged": text}) if line is None else text)
    if not moved:
        return
    with path.with_name(DROPPED).open("a") as file:
        file.write("".join(line + "\n" for line in moved))
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _line(text: str) -> dict[str, Any] | None:
    """Returns the content of a line; None for one that is damaged."""
    try:
        read = json.loads(text)
    except ValueError:
        return None
    right = isinstance(read, dict) and type(read.get("step")) is int
    return read if right else None


def _plain(value: float) -> float | None:
    """Returns a number as JSON has it, which knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None
