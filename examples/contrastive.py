"""Contrastive training over devices, and what their statistics give away: SimCLR with synced batch norm and without.

Of two views of each image in the batch, one is the query and one the key, and each query is to find
its key among those
of all devices: examples interact on purpose. Where each device normalizes by statistics of its own,
  they interact in a
second way, which is none: a device's queries and keys carry its statistics, and are found by them.

    per device  each device by its own statistics; queries beside their keys
    shuffled    as before, but keys are dealt to other devices than their queries (MoCo)
    synced      statistics of all devices (SimCLR)
    layer norm  none

Trains a small encoder on 8 simulated devices, with the loss over the keys of all of them, and shows
what is found, what of it is leakage (`nj.diagnostics.leakage`), and what the features are worth to
a linear classifier.

    python examples/contrastive.py                                  # scikit-learn's digits: nothing to download
    python examples/contrastive.py --data mnist --data-dir DIR
    python examples/contrastive.py --data cifar10 --data-dir DIR

Tables, JSON and a plot come out, the files in --out. Ctrl-C stops, and keeps what is finished. With
the same seed all ways start from the same kernels and see the same images. See examples/README.md
for what to expect.
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
    """Returns the options that the arguments ask for, or exits with a line that says what is wrong with them."""
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
