"""Ctrl-C as a question that is asked between two steps, not an exception anywhere."""

import os
import signal
from types import FrameType
from typing import Any, Self

EXIT_STATUS = 128 + signal.SIGINT


class Interrupted(Exception):
    """Ctrl-C was pressed."""


class Interrupt:
    """Context in which `check` raises the first Ctrl-C, and a second one acts at once.

    A KeyboardInterrupt in the middle of compiling can be lost, or come out as another error.
    """

    def __enter__(self) -> Self:
        self.pressed = False
        # Also where SIGINT is ignored, as in jobs that a shell script starts in the background.
        self._before: Any = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
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
