"""Contrastive training over devices, and what their statistics leak: SimCLR and synced batch norm.

Of two views of each image in the batch, one is the query and one the key, and each query should
find its key among the keys of all devices: examples interact on purpose. If each device normalizes
by its own statistics, there is a second, unwanted interaction: queries and keys of a device carry
its statistics, which reveal the match.

    per device  each device has its own statistics; queries and their keys are together
    shuffled    the same, but keys go to other devices than their queries (MoCo)
    synced      statistics of all devices (SimCLR)
    layer norm  no statistics of the batch

Trains a small encoder on 8 simulated devices, with the loss over the keys of all devices, and shows
how many keys are found, how much of that is leakage (`nj.diagnostics.leakage`), and the accuracy of
a linear classifier on the features.

    python examples/contrastive.py                      # scikit-learn's digits: nothing to download
    python examples/contrastive.py --data mnist --data-dir DIR
    python examples/contrastive.py --data cifar10 --data-dir DIR

Prints tables, and writes JSON and a plot to --out. Ctrl-C stops, and keeps finished runs. With the
same seed all ways start from the same kernels and use the same images. See examples/README.md for
what to expect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from common.arguments import Parser, number
from common.interrupt import run

DEFAULTS = {
    "digits": {
        "seeds": 1,
        "steps": 400,
        "eval_every": 50,
        "batch_size": 32,
        "learning_rate": 0.003,
    },
    "mnist": {
        "seeds": 1,
        "steps": 2000,
        "eval_every": 200,
        "batch_size": 64,
        "learning_rate": 0.003,
    },
    "cifar10": {
        "seeds": 1,
        "steps": 20000,
        "eval_every": 1000,
        "batch_size": 256,
        "learning_rate": 0.002,
    },
}
LABELS = {"digits": 100, "mnist": 1000, "cifar10": 50000}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    parser.add_runs("contrastive", DEFAULTS)
    count = number(int, "a positive integer")
    several = number(int, "an integer above 1", 2)
    parser.add_argument(
        "--devices", type=several, default=8, metavar="N", help="simulated (default: %(default)s)"
    )
    labels = ", ".join(f"{name} {number:,}" for name, number in LABELS.items())
    parser.add_argument(
        "--labels", type=count, metavar="N", help=f"of the linear classifier ({labels})"
    )
    options = parser.parse_runs(arguments)
    options.labels = options.labels or LABELS[options.data]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    return run("simclr", parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
