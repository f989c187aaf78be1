"""Recalibrates running statistics that do not fit: averaged weights, and shifted test images.

Trains a network on digits, with an exponential moving average (EMA) of its weights, and evaluates

    as they are   the trained weights, and the EMA weights with three sets of statistics: the
                  trained weights' running ones, their EMA, and recalibrated on training images
    --shift       the trained weights on shifted test images (faint, inverted or noisy), with their
                  running statistics, and recalibrated on shifted training images without labels

    python examples/recalibrate.py                      # scikit-learn's digits: nothing to download
    python examples/recalibrate.py --data mnist --data-dir DIR
    python examples/recalibrate.py --data cifar10 --data-dir DIR

Recalibrating is one line (examples/studies/recalibrate/study.py):

    params, batch_stats = nj.recalibrate(apply_fn, (ema, batch_stats), batches)

Prints a table, and writes JSON and a plot to --out. Ctrl-C stops, and keeps finished runs. See
examples/README.md for what to expect.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from common.arguments import COUNT, RATE, SHIFTS, Parser
from common.interrupt import command

RUN = {"seeds": 3, "steps": 600, "eval_every": 50, "batch_size": 32, "learning_rate": 0.1}


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    shift = "what happens to the test images"
    parser.add("--shift", None, shift, choices=SHIFTS, default="faint")
    parser.add("--ema", RATE, "that the average looks back", default=300, metavar="STEPS")
    parser.add("--calibrate", COUNT, "images to recalibrate on", default=1000)
    parser.add_runs("recalibrate", dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
    return parser.parse_runs(arguments)


main = command("recalibrate.study:Recalibrate", parse)

if __name__ == "__main__":
    sys.exit(main())
