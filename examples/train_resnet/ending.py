"""How a process ends: exit statuses, last lines, and an immediate exit if others would hang."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import NoReturn

FAILED, MISTAKE, LOST, DIVERGED = 1, 2, 3, 4
STATUSES = """\
exit statuses:
  0    finished; or ended by SIGTERM or SIGHUP, after saving
  1    a file of the data cannot be read, or a checkpoint cannot be written
  2    nothing was trained and nothing changed: options, data, hosts or checkpoints do not fit
  3    another process is gone or does not answer, or there was no progress for --stall seconds
  4    a loss or a statistic is not finite (see --allow-nan)
  130  ended by Ctrl-C, after saving; by a second Ctrl-C, without"""


def say(message: str) -> None:
    """Prints a line about the run to standard error, even if a terminal has closed it."""
    try:
        print(f"train_resnet: {message}", file=sys.stderr, flush=True)
    except OSError:
        pass


def complain(message: str) -> None:
    """Prints the line with the reason why the run ends."""
    say(f"error: {message}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error, or of its cause from the operating system."""
    text = str(error).strip()
    # TensorStore puts it after a paragraph about its location.
    if found := re.search(r"OS error (?:code )?\d+: ([^\]'\"]+)", text):
        return found[1].strip()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (text.splitlines() or [type(error).__name__])[0][:300]


class LastWords:
    """A line that is printed when this process ends, unless it is taken back.

    JAX's runtime ends a process from C++ when another process is gone, and SIGKILL ends a process
    without any output. So a shell waits for the end of a pipe that closes with this process.
    """

    standing: list[LastWords] = []

    def __init__(self, message: str):
        script = 'read -r end || printf "%s\\n" "$0" >&2'
        self._shell = subprocess.Popen(
            ["sh", "-c", script, f"train_resnet: error: {message}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.standing.append(self)

    def take_back(self) -> None:
        """Prevents the line from being printed."""
        if self in self.standing:
            self.standing.remove(self)
            self._shell.communicate(b"end\n")


def leave(status: int, message: str) -> NoReturn:
    """Exits immediately, since a normal exit would wait for processes that are gone."""
    complain(message)
    for words in tuple(LastWords.standing):
        words.take_back()
    try:
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # the progress bar hides the cursor
        sys.stdout.flush()
    except OSError:
        pass
    os._exit(status)
