"""Fold batch normalization, then quantize to int8: accuracies before and after.

Trains a small convolutional network with batch normalization and shows its test accuracy four
times:

    float          as it was trained
    folded         each batch norm folded into the convolution before it, by normjax.deploy.fold
    folded, int8   folded, with kernels and activations quantized by qwix
    int8           quantized without folding: int8 convolutions, float32 batch norms

    python examples/quantize.py                         # scikit-learn's digits: nothing to download
    python examples/quantize.py --data mnist --data-dir DIR
    python examples/quantize.py --data cifar10 --data-dir DIR

qwix works on Flax modules, and `Folded.as_linen` makes one of the folded network, which is
quantized as any other (`quantized` in examples/common/quantize.py, three lines).

Prints a table, and writes JSON to --out. Ctrl-C stops, and keeps finished runs. See
examples/README.md for what to expect. qwix is an extra: pip install 'normjax[examples,quantize]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.arguments import Parser, number
from common.interrupt import run


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    count, rate = number(int, "a positive integer"), number(float, "a positive number")
    parser.add_data(("digits", "mnist", "cifar10"))
    add = parser.add_argument
    add(
        "--seeds",
        type=count,
        default=3,
        metavar="N",
        help="how often to train (default: %(default)s); medians show",
    )
    add("--steps", type=count, default=300, metavar="N", help="of training (default: %(default)s)")
    add("--eval-every", type=count, default=50, metavar="N", help="steps between two evaluations")
    add(
        "--batch-size",
        type=number(int, "an integer above 1", 2),
        default=64,
        metavar="N",
        help="(default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=rate,
        default=0.1,
        metavar="RATE",
        help="of SGD with momentum (default: %(default)s)",
    )
    add(
        "--width",
        type=count,
        default=16,
        metavar="N",
        help="channels of the first stage (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results/quantize"),
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    parser.check_data(options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    return run("quantize", parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
