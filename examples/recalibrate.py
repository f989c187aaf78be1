"""Recalibrates running statistics that do not fit: averaged weights, and shifted test images.

Trains a network on digits, with an exponential moving average (EMA) of its weights, and evaluates

    as they are   the trained weights, and the EMA weights with three sets of statistics: the
                  trained weights' running ones, their EMA, and recalibrated on training images
    --shift       the trained weights on shifted test images (faint, inverted or noisy), with their
                  running statistics, and recalibrated on shifted training images without labels

    python examples/recalibrate.py                      # scikit-learn's digits: nothing to download
    python examples/recalibrate.py --data mnist --data-dir DIR
    python examples/recalibrate.py --data cifar10 --data-dir DIR

Recalibrating is one line (examples/common/recalibration.py):

    params, batch_stats = nj.recalibrate(apply_fn, (ema, batch_stats), batches)

Prints a table, and writes JSON and a plot to --out. Ctrl-C stops, and keeps finished runs. See
examples/README.md for what to expect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.arguments import SHIFTS, Parser, number
from common.interrupt import run


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    count, rate = number(int, "a positive integer"), number(float, "a positive number")
    parser.add_data(("digits", "mnist", "cifar10"))
    add = parser.add_argument
    add(
        "--shift",
        choices=SHIFTS,
        default="faint",
        help="what happens to the test images (default: %(default)s)",
    )
    add(
        "--seeds",
        type=count,
        default=3,
        metavar="N",
        help="how often to train (default: %(default)s); medians show",
    )
    add(
        "--steps",
        type=count,
        default=600,
        metavar="N",
        help="budget of each run (default: %(default)s)",
    )
    add("--eval-every", type=count, default=50, metavar="N", help="steps between two evaluations")
    add(
        "--batch-size",
        type=number(int, "an integer above 1", 2),
        default=32,
        metavar="N",
        help="examples a step",
    )
    add(
        "--learning-rate",
        type=rate,
        default=0.1,
        metavar="RATE",
        help="of SGD with momentum (default: %(default)s)",
    )
    add(
        "--ema",
        type=rate,
        default=300,
        metavar="STEPS",
        help="that the average looks back (default: %(default)s)",
    )
    add(
        "--calibrate",
        type=count,
        default=1000,
        metavar="N",
        help="images to recalibrate on (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results/recalibrate"),
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    parser.check_data(options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    return run("recalibration", parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
