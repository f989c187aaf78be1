"""Ctrl-C as a question that is asked between two steps, not an exception anywhere."""

import importlib
import os
import signal
from argparse import Namespace
from collections.abc import Callable, Sequence
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


def command(study: str, parse: Callable[..., Namespace]) -> Callable[..., int]:
    """Returns the main function of a study such as "landscape.study:Landscapes".

    It takes the command line and returns the exit status. JAX takes seconds to import, and the
    study imports it: only then, so that --help and mistakes are answered at once, and Ctrl-C is
    noted meanwhile.
    """
    module, name = study.split(":")

    def main(arguments: Sequence[str] | None = None) -> int:
        options = parse(arguments)
        with Interrupt() as interrupt:
            made = getattr(importlib.import_module(f"studies.{module}"), name)(options)
            return importlib.import_module("common.study").conduct(made, interrupt)

    return main
