"""What the command lines of the examples have in common: flags, checks, and mistakes that get one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

SHIFTS = ("faint", "inverted", "noisy")  # what happens to images, see common/domains.py, which needs JAX


class Parser(argparse.ArgumentParser):
    """A parser that shows its description as it is written and takes no abbreviations."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Exits with one line; argparse's own puts the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_data(self, choices: Sequence[str]) -> None:
        """Adds the flags that say which images to use."""
        count = number(int, "a positive integer")
        self.add_argument("--data", choices=choices, default="digits", help="images (default: %(default)s)")
        files = " or ".join(choices[1:])
        self.add_argument("--data-dir", type=Path, metavar="DIR", help=f"folder with the official files of {files}")
        self.add_argument("--train-examples", type=count, metavar="N", help="use only the first N training images")
        self.add_argument("--test-examples", type=count, metavar="N", help="use only the first N test images")

    def check_data(self, options: argparse.Namespace) -> None:
        """Exits unless there is a folder for data that are read from one."""
        if options.data != "digits" and options.data_dir is None:
            self.error(f"--data {options.data} needs --data-dir, the folder that holds its files")


def number(kind: Callable[[str], float], expected: str, least: float = 0) -> Callable[[str], float]:
    """Returns a conversion to a positive, finite number of at least `least`, for argparse."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf and value >= least):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert
