"""The command line of `speedup.py`: flags, defaults for each network and data set, and checks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn


class Variant(NamedTuple):
    """A row of the paper's figure 3: a network to train. `factor` multiplies the baseline's learning rate."""

    name: str
    normalize: bool
    factor: float
    activation: str


class Defaults(NamedTuple):
    """What suits a network on a data set. The learning rate is the baseline's."""

    steps: int
    eval_every: int
    batch_size: int
    learning_rate: float
    seeds: int


# The batches of 60 and 32 and the rate of 0.0015 are the paper's. Budgets are for two CPU cores.
DEFAULTS = {
    ("mlp", "digits"): Defaults(8000, 20, 60, 0.1, seeds=3),
    ("mlp", "mnist"): Defaults(10_000, 50, 60, 0.1, seeds=3),
    ("mlp", "cifar10"): Defaults(10_000, 50, 60, 0.1, seeds=1),
    ("inception", "digits"): Defaults(1000, 10, 32, 0.0015, seeds=1),
    ("inception", "mnist"): Defaults(2000, 50, 32, 0.0015, seeds=1),
    ("inception", "cifar10"): Defaults(4000, 100, 32, 0.0015, seeds=1),
}

# Wide enough for the best to lie inside.
SWEEP = {"mlp": (1 / 3, 1, 3, 10, 30, 100), "inception": (1, 3, 10, 30, 100)}
MOMENTUM = {"mlp": None, "inception": 0.9}


@dataclass(frozen=True)
class Options:
    """What to run. `depth` is None and `data_dir` None where the network and the data have no use for it."""

    network: str
    depth: int | None
    data: str
    data_dir: Path | None
    seeds: int
    steps: int
    batch_size: int
    learning_rate: float
    eval_every: int
    sweep: tuple[float, ...]
    train_examples: int | None
    test_examples: int | None
    out: Path

    @property
    def momentum(self) -> float | None:
        """SGD's momentum: none for the MLP, as in the paper's section 4.1."""
        return MOMENTUM[self.network]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with one line; argparse's own puts the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: Sequence[str] | None, description: str | None) -> Options:
    """Returns the options that the arguments ask for, or exits with a line that says what is wrong with them."""
    parser = _parser(description)
    given = vars(parser.parse_args(arguments))
    if given["data"] != "digits" and given["data_dir"] is None:
        parser.error(f"--data {given['data']} needs --data-dir, the folder that holds its files")
    if given["network"] == "inception" and given["depth"] is not None:
        parser.error("--depth is for --network mlp")
    if given["network"] == "mlp" and given["depth"] is None:
        given["depth"] = 3
    defaults = DEFAULTS[given["network"], given["data"]]._asdict()
    if given["steps"] is not None:
        # As many evaluations as there would have been.
        defaults["eval_every"] = max(1, given["steps"] * defaults["eval_every"] // defaults["steps"])
    given |= {name: value for name, value in defaults.items() if given[name] is None}
    # 1 is always there: the baseline as it is; each factor is trained once.
    sweep = sum(given["sweep"] or [SWEEP[given["network"]]], start=())
    given["sweep"] = tuple(sorted({1.0, *sweep}))
    return Options(**given)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    count, rate = _number(int, "a positive integer"), _number(float, "a positive number")
    add = parser.add_argument
    add("--network", choices=("mlp", "inception"), default="mlp", help="what to train (default: %(default)s)")
    add("--depth", type=count, metavar="N", help="hidden layers of the mlp (default: 3)")
    add("--data", choices=("digits", "mnist", "cifar10"), default="digits", help="images (default: %(default)s)")
    add("--data-dir", type=Path, metavar="DIR", help="folder with the official files of mnist or cifar10")
    add("--seeds", type=count, metavar="N", help="how often to train each variant; tables show medians")
    add("--steps", type=count, metavar="N", help="budget of each run")
    add("--batch-size", type=_number(int, "an integer above 1", 2), metavar="N", help="examples a step")
    add("--learning-rate", type=rate, metavar="RATE", help="of the baseline; BN-x5 and BN-x30 multiply it")
    add("--eval-every", type=count, metavar="N", help="steps between two evaluations")
    add("--sweep", type=_numbers, nargs="+", metavar="FACTORS", help="of the baseline's learning rate,"
        " for the stricter table (default: 1,3,10,30,100, for the mlp also 1/3); 1 to go without")  # fmt: skip
    add("--train-examples", type=count, metavar="N", help="use only the first N training images")
    add("--test-examples", type=count, metavar="N", help="use only the first N test images")
    add("--out", type=Path, metavar="DIR", default=Path("results/speedup"), help="(default: %(default)s)")
    return parser


def _number(kind: Callable[[str], float], expected: str, least: float = 0) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf and value >= least):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def _numbers(text: str) -> tuple[float, ...]:
    """Reads factors such as "1/3,1,3"."""
    factors = []
    for part in text.split(","):
        numerator, _, denominator = part.partition("/")
        convert = _number(float, "positive factors such as 1/3,1,3,10")
        factors.append(convert(numerator) / convert(denominator or "1"))
    return tuple(factors)
