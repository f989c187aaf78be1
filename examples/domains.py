"""Several batch_stats for one params: domains that share a network, but not their statistics.

Trains one small network on digits from two domains, as they are and with --shift (faint, inverted
or noisy), and shows the test accuracy in each, with batch normalization's statistics handled in
four ways:

    mixed        one batch_stats; every batch holds both domains
    in turn      one batch_stats; batches of one domain, then of the other
    own          a batch_stats for each domain; batches as before
    conditional  one batch_stats, mixed batches; each example gets its domain's scale and bias

    python examples/domains.py                          # scikit-learn's digits: nothing to download
    python examples/domains.py --data mnist --data-dir DIR

The network is a pure function `apply(params, batch_stats, x, train)` that returns its new
statistics, so a second set of them is a second variable (examples/common/sharing.py). The same
lines work for

adversarial examples (Xie et al. 2020, AdvProp; see adversarial_pairs.py), whose statistics differ
from clean images':

    clean, stats["clean"] = apply(params, stats["clean"], x, True)
    attacked, stats["attacked"] = apply(params, stats["attacked"], attack(params, x), True)

a teacher that is a moving average of the student (Tarvainen & Valpola 2017), with statistics of its
own, which its own forward passes update, or with the student's:

    logits, stats["student"] = apply(params["student"], stats["student"], x, True)
    targets, stats["teacher"] = apply(params["teacher"], stats["teacher"], x, True)

and GANs, whose discriminator gets real and generated images in turn:

    real, stats["real"] = apply(params, stats["real"], images, True)
    fake, stats["fake"] = apply(params, stats["fake"], generated, True)

A pass that should not change statistics, such as the attack's, drops them: `logits, _ =
apply(...)`.

Prints a table, and writes JSON and a plot to --out. Ctrl-C stops, and keeps finished runs. With the
same seed all ways start from the same kernels and use the same images. See examples/README.md for
what to expect.
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
    parser.add_data(("digits", "mnist"))
    add = parser.add_argument
    add(
        "--shift",
        choices=SHIFTS,
        default="faint",
        help="what the second domain is (default: %(default)s)",
    )
    add(
        "--seeds",
        type=count,
        default=5,
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
    add("--eval-every", type=count, default=20, metavar="N", help="steps between two evaluations")
    add(
        "--batch-size",
        type=number(int, "an integer above 1", 2),
        default=32,
        metavar="N",
        help="of each domain",
    )
    add(
        "--learning-rate",
        type=rate,
        default=0.1,
        metavar="RATE",
        help="of SGD with momentum (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results/domains"),
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    parser.check_data(options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    return run("domains", parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
