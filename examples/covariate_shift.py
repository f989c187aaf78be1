"""Internal covariate shift: what batch normalization was thought to reduce, and an experiment against that.

Trains the network of Ioffe & Szegedy (2015), figure 1, three layers of 100 sigmoids on batches of
60, in three ways:

    without normalization
    with batch normalization      before each sigmoid
    with noise after it           whose mean and variance are drawn anew at each step, for each unit (Santurkar et al.
                                  2018): the inputs of every layer shift all the time

    python examples/covariate_shift.py                              # scikit-learn's digits: nothing to download
    python examples/covariate_shift.py --data mnist --data-dir DIR  # the paper's images

and shows, over the steps of training, the test accuracy, the distribution of what goes into a
typical sigmoid of the last hidden layer (`nj.diagnostics.percentiles`), and how much the update of
the layers before it changes a layer's gradient (`nj.diagnostics.internal_covariate_shift`).

What the two papers report, beside what is measured here, is printed as a table; JSON and a plot go
to --out. Ctrl-C stops, and keeps what is finished. See examples/README.md for what to expect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from common.arguments import Parser
from common.interrupt import run

DEFAULTS = {
    "digits": {
        "seeds": 3,
        "steps": 8000,
        "eval_every": 100,
        "batch_size": 60,
        "learning_rate": 0.1,
    },
    "mnist": {
        "seeds": 1,
        "steps": 10_000,
        "eval_every": 100,
        "batch_size": 60,
        "learning_rate": 0.1,
    },
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options that the arguments ask for, or exits with a line that says what is wrong with them."""
    parser = Parser(__doc__)
    parser.add_runs("covariate_shift", DEFAULTS)
    return parser.parse_runs(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    return run("covariate_shift", parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
