"""The command lines of the examples: options that several have, and one line for each mistake."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


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


COUNT = number(int, "a positive integer")
SEVERAL = number(int, "an integer above 1", 2)
RATE = number(float, "a positive number")
METAVARS = {COUNT: "N", SEVERAL: "N", RATE: "RATE", Path: "DIR"}

# What happens to images, see studies/domains/ways.py, which needs JAX.
SHIFTS = ("faint", "inverted", "noisy")
# The options that several studies have; each study says which, and their defaults for its data.
OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "seeds": (COUNT, "how often to run each; medians show"),
    "steps": (COUNT, "budget of each run"),
    "eval_every": (COUNT, "steps between two evaluations"),
    "batch_size": (SEVERAL, "examples a step"),
    "learning_rate": (RATE, "of the optimizer"),
    "radius": (RATE, "of the attack: largest change of a pixel, from 0 to 1"),
    "labels": (COUNT, "of the linear classifier"),
    "units": (COUNT, "of the state"),
}


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

    def add(self, flag: str, kind: Callable[[str], Any] | None, help: str, **settings: Any) -> None:
        """Adds an option; the help shows its default."""
        if kind in METAVARS:
            settings = {"metavar": METAVARS[kind]} | settings
        if settings.get("default") is not None:
            help += " (default: %(default)s)"
        self.add_argument(flag, type=kind or str, help=help, **settings)

    def add_data(self, choices: Sequence[str]) -> None:
        """Adds the options that say which images to use."""
        self.add("--data", None, "images", choices=choices, default="digits")
        self.add(
            "--data-dir", Path, f"folder with the official files of {' or '.join(choices[1:])}"
        )
        self.add("--train-examples", COUNT, "use only the first N training images")
        self.add("--test-examples", COUNT, "use only the first N test images")

    def add_runs(self, name: str, defaults: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the options of a study: its data, and the options in its defaults.

        Args:
          name: the name of the study, and of the folder for its files.
          defaults: by data, the values of some of `OPTIONS`.
        """
        self.defaults = defaults
        self.add_data(tuple(defaults))
        for option in next(iter(defaults.values())):
            kind, description = OPTIONS[option]
            values = ", ".join(f"{data} {given[option]}" for data, given in defaults.items())
            self.add("--" + option.replace("_", "-"), kind, f"{description} ({values})")
        self.add("--out", Path, "folder for the results", default=Path("results", name))

    def parse_runs(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Returns the options of a study, with the defaults of its data for missing ones."""
        return self.complete(self.parse_args(arguments))

    def complete(self, options: argparse.Namespace) -> argparse.Namespace:
        """Fills in the defaults of the data for missing options."""
        self.check_data(options)
        for option, value in self.defaults[options.data].items():
            if getattr(options, option) is None:
                setattr(options, option, value)
        return options

    def check_data(self, options: argparse.Namespace) -> None:
        """Exits unless there is a folder for data that are read from one, and for no others."""
        if options.data == "digits" and options.data_dir is not None:
            self.error(
                "--data-dir is for --data mnist and the like: digits are not read from files"
            )
        if options.data != "digits" and options.data_dir is None:
            self.error(f"--data {options.data} needs --data-dir, the folder that holds its files")
