"""The command lines of the examples: options that several have, and one line for each mistake."""

import argparse
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.interrupt import Interrupt

ENDING = """
Prints tables, and writes JSON and a plot to --out. Ctrl-C stops, and keeps finished runs. See
examples/README.md for what to expect."""


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


class Program(Parser):
    """The command line of a study, such as "landscape.study:Landscapes", and the program.

    `check` is called with the program and its options before missing ones get their defaults.
    """

    def __init__(
        self,
        study: str,
        description: str | None,
        check: Callable[["Program", argparse.Namespace], None] | None = None,
    ):
        super().__init__(f"{description}{ENDING}")
        self.study, self.check, self.defaults = study, check, {}
        self.name = study.partition(".")[0]
        self.prog = f"{self.name}.py"
        self.add("--out", Path, "folder for the results", default=Path("results", self.name))

    def add_runs(self, defaults: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the options for data, and those of `OPTIONS` that have defaults by data."""
        self.defaults = defaults
        self.add_data(tuple(defaults))
        for option in next(iter(defaults.values())):
            kind, description = OPTIONS[option]
            values = ", ".join(f"{data} {given[option]}" for data, given in defaults.items())
            self.add("--" + option.replace("_", "-"), kind, f"{description} ({values})")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Returns the options of a command line, or exits with a line that says what is wrong."""
        options = self.parse_args(arguments)
        if self.defaults:
            self.check_data(options)
        if self.check is not None:
            self.check(self, options)
        if self.defaults:
            fill_in(options, self.defaults[options.data])
        return options

    def check_data(self, options: argparse.Namespace) -> None:
        """Exits unless there is a folder for data that are read from one, and for no others."""
        named, given = options.data != "digits", options.data_dir is not None
        if given and not named:
            self.error(
                "--data-dir is for --data mnist and the like: digits are not read from files"
            )
        if named and not given:
            self.error(f"--data {options.data} needs --data-dir, the folder that holds its files")

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the study of a command line, and returns the exit status.

        JAX takes seconds to import, and the study imports it: only then, so that --help and
        mistakes are answered at once, and Ctrl-C is noted meanwhile.
        """
        options = self.parse(arguments)
        module, name = self.study.split(":")
        try:
            with Interrupt() as interrupt:
                study = getattr(importlib.import_module(f"studies.{module}"), name)(options)
                return importlib.import_module("common.study").conduct(study, interrupt)
        except ModuleNotFoundError as error:
            from common.extras import stop_without  # which imports JAX

            stop_without(error)


def fill_in(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Gives missing options their defaults."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
