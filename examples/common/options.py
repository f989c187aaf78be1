"""The command line of `speedup.py`: flags, defaults for each network and data set, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.arguments import Parser, number


class Variant(NamedTuple):
    """A row of the paper's figure 3: a network; `factor` multiplies the baseline's rate."""

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
DEPTHS = {"mlp": (2, 3, 4, 6, 12), "inception": ()}
SWEEP = {"mlp": (1 / 3, 1, 3, 10, 30, 100), "inception": (1, 3, 10, 30, 100)}
MOMENTUM = {"mlp": None, "inception": 0.9}


@dataclass(frozen=True)
class Options:
    """What to run. `depth` and `data_dir` are None if network and data do not need them."""

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
    depths: tuple[int, ...]
    train_examples: int | None
    test_examples: int | None
    out: Path

    @property
    def momentum(self) -> float | None:
        """SGD's momentum: none for the MLP, as in the paper's section 4.1."""
        return MOMENTUM[self.network]


def parse(arguments: Sequence[str] | None, description: str | None) -> Options:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = _parser(description)
    namespace = parser.parse_args(arguments)
    parser.check_data(namespace)
    given = vars(namespace)
    if given["network"] == "inception" and given["depth"] is not None:
        parser.error("--depth is for --network mlp")
    if given["network"] == "inception" and given["depths"]:
        parser.error("--depths is for --network mlp")
    if given["network"] == "mlp" and given["depth"] is None:
        given["depth"] = 3
    given["depths"] = tuple(
        sorted(set(DEPTHS[given["network"]] if given["depths"] is None else given["depths"]))
    )
    defaults = DEFAULTS[given["network"], given["data"]]._asdict()
    if given["steps"] is not None:
        # As many evaluations as there would have been.
        defaults["eval_every"] = max(
            1, given["steps"] * defaults["eval_every"] // defaults["steps"]
        )
    given |= {name: value for name, value in defaults.items() if given[name] is None}
    # 1 is always there: the baseline as it is; each factor is trained once.
    sweep = sum(given["sweep"] or [SWEEP[given["network"]]], start=())
    given["sweep"] = tuple(sorted({1.0, *sweep}))
    return Options(**given)


def _parser(description: str | None) -> Parser:
    parser = Parser(description)
    count, rate = number(int, "a positive integer"), number(float, "a positive number")
    add = parser.add_argument
    add(
        "--network",
        choices=("mlp", "inception"),
        default="mlp",
        help="what to train (default: %(default)s)",
    )
    add("--depth", type=count, metavar="N", help="hidden layers of the mlp (default: 3)")
    parser.add_data(("digits", "mnist", "cifar10"))
    add(
        "--seeds",
        type=count,
        metavar="N",
        help="how often to train each variant; tables show medians",
    )
    add("--steps", type=count, metavar="N", help="budget of each run")
    add(
        "--batch-size",
        type=number(int, "an integer above 1", 2),
        metavar="N",
        help="examples a step",
    )
    add(
        "--learning-rate",
        type=rate,
        metavar="RATE",
        help="of the baseline; BN-x5 and BN-x30 multiply it",
    )
    add("--eval-every", type=count, metavar="N", help="steps between two evaluations")
    add(
        "--sweep",
        type=_numbers,
        nargs="+",
        metavar="FACTORS",
        help="of the baseline's learning rate, for the stricter table "
        "(default: 1,3,10,30,100, for the mlp also 1/3); 1 to go without",
    )
    add(
        "--depths",
        type=count,
        nargs="*",
        metavar="N",
        help="hidden layers of the mlps of growing depth, each trained for an eighth of the steps "
        "(default: 2 3 4 6 12); without a number, none are",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results/speedup"),
        help="(default: %(default)s)",
    )
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    """Reads factors such as "1/3,1,3"."""
    factors = []
    for part in text.split(","):
        numerator, _, denominator = part.partition("/")
        convert = number(float, "positive factors such as 1/3,1,3,10")
        factors.append(convert(numerator) / convert(denominator or "1"))
    return tuple(factors)
