"""Ctrl-C as a question that is asked between two steps, not an exception anywhere."""

from __future__ import annotations

import importlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_STATUS = 128 + signal.SIGINT


class Interrupted(Exception):
    """Ctrl-C was pressed."""


class Interrupt:
    """Context in which `check` raises the first Ctrl-C, and a second one acts at once.

    A KeyboardInterrupt in the middle of compiling can be lost, or come out as another error.
    """

    def __enter__(self) -> Interrupt:
        self.pressed = False
        # Also where SIGINT is ignored, as in jobs that a shell script starts in the background.
        self._before: Any = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raises Interrupted if Ctrl-C was pressed."""
        if self.pressed:
            raise Interrupted

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print(), which may be what the signal came in the middle of.
        os.write(2, b"\nStopping after this evaluation ...\n")


def run(experiment: str, *arguments: Any) -> int:
    """Returns the exit status of `common.EXPERIMENT.run(*arguments, interrupt)`.

    JAX takes seconds to import, and the experiment imports it: only now, so that --help and
    mistakes are answered at once, and Ctrl-C is noted meanwhile.
    """
    with Interrupt() as interrupt:
        return importlib.import_module(f"common.{experiment}").run(*arguments, interrupt)
