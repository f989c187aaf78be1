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

DROPPED = "metrics.dropped.jsonl"  # lines of steps that are repeated, see `forget`


class Metrics:
    """The reports of process 0; in other processes, all methods do nothing."""

    def __init__(self, folder: Path, steps: int, start: int, batch_size: int, active: bool):
        self.active, self.steps, self.batch_size = active, steps, batch_size
        self.console = Console(quiet=not active)
        if not active:
            return
        # imported here, since this takes a second, which only process 0 needs
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
        """Reports a finished training step, and the images per second since the previous one."""
        if not self.active:
            return
        # If two steps were found to be finished at the same time, they share their rate.
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
        self.before = self.last = None  # evaluation time does not count as training time
        self._write(step, "test", values)
        self.say(f"step {step}: test accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f}")

    def say(self, message: str) -> None:
        """Prints a line; a run continues even if standard output is closed."""
        try:
            self.console.print(message, soft_wrap=True, highlight=False)
        except OSError:
            self.console.quiet = True

    def close(self) -> None:
        """Writes remaining output."""
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
    """Moves the lines of steps that will be repeated to another file.

    Damaged lines are moved, too, such as an unfinished line of a process that died.
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
    """Returns the content of a line, or None if it is damaged."""
    try:
        read = json.loads(text)
    except ValueError:
        return None
    right = isinstance(read, dict) and type(read.get("step")) is int
    return read if right else None


def _plain(value: float) -> float | None:
    """Returns a number for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
