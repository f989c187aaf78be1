"""Common flags and checks of the examples' command lines; each mistake gets one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# what happens to images, see common/domains.py, which needs JAX
SHIFTS = ("faint", "inverted", "noisy")


class Parser(argparse.ArgumentParser):
    """A parser that shows its description as it is written and takes no abbreviations."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exits with one line; argparse's own puts the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_data(self, choices: Sequence[str]) -> None:
        """Adds the flags that say which images to use."""
        count = number(int, "a positive integer")
        self.add_argument(
            "--data", choices=choices, default="digits", help="images (default: %(default)s)"
        )
        files = " or ".join(choices[1:])
        self.add_argument(
            "--data-dir",
            type=Path,
            metavar="DIR",
            help=f"folder with the official files of {files}",
        )
        self.add_argument(
            "--train-examples", type=count, metavar="N", help="use only the first N training images"
        )
        self.add_argument(
            "--test-examples", type=count, metavar="N", help="use only the first N test images"
        )

    def add_runs(self, name: str, defaults: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the flags of a study: its data, and the flags in its defaults, which depend on data.

        Args:
          name: the name of the study, and of the folder for its files.
          defaults: by data, the values of some of `RUNS`.
        """
        self.defaults = defaults
        self.add_data(tuple(defaults))
        for flag in next(iter(defaults.values())):
            kind, metavar, description = RUNS[flag]
            values = ", ".join(f"{data} {given[flag]}" for data, given in defaults.items())
            self.add_argument(
                "--" + flag.replace("_", "-"),
                type=kind,
                metavar=metavar,
                help=f"{description} ({values})",
            )
        self.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            default=Path("results", name),
            help="(default: %(default)s)",
        )

    def parse_runs(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Returns the options of a study, with the defaults of its data for missing ones."""
        options = self.parse_args(arguments)
        self.check_data(options)
        for flag, value in self.defaults[options.data].items():
            if getattr(options, flag) is None:
                setattr(options, flag, value)
        return options

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


_COUNT, _RATE = number(int, "a positive integer"), number(float, "a positive number")
RUNS: Mapping[str, tuple[Callable[[str], float], str, str]] = {
    "seeds": (_COUNT, "N", "how often to run each; medians show"),
    "steps": (_COUNT, "N", "budget of each run"),
    "eval_every": (_COUNT, "N", "steps between two evaluations"),
    "batch_size": (number(int, "an integer above 1", 2), "N", "examples a step"),
    "learning_rate": (_RATE, "RATE", "of the optimizer"),
    "radius": (_RATE, "R", "of the attack: largest change of a pixel, from 0 to 1"),
}
