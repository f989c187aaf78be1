"""The loss landscape with and without batch normalization: how far gradients can be trusted.

Trains a small VGG, without normalization and with batch normalization, by plain SGD at several
learning rates, and measures on the way, as Santurkar et al. (2018) do in their figure 4, along the
gradient of a training batch

    how much the loss varies,
    how far the gradient moves (gradient predictiveness), and
    the largest ratio of that to the distance moved (effective beta-smoothness)

with `nj.diagnostics.landscape`, and at some checkpoints the largest eigenvalue of the Hessian, over
all directions, with `nj.diagnostics.hessian_eigenvalue`.

    python examples/landscape.py                                # digits: nothing to download
    python examples/landscape.py --learning-rates 0.05 0.2
    python examples/landscape.py --data cifar10 --data-dir DIR  # the paper's images

Prints a table of what the paper reports and what is measured here, and writes JSON and a plot to
--out. Ctrl-C stops, and keeps finished runs. See examples/README.md for what to expect.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from common.arguments import COUNT, RATE, Parser
from common.interrupt import command

DEFAULTS = {
    "digits": {"seeds": 2, "steps": 300, "eval_every": 10, "batch_size": 32},
    "mnist": {"seeds": 1, "steps": 300, "eval_every": 10, "batch_size": 32},
    "cifar10": {"seeds": 1, "steps": 1000, "eval_every": 25, "batch_size": 128},
}


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    parser.add("--learning-rates", RATE, "of SGD", nargs="+", default=[0.1, 0.5])
    parser.add("--checkpoints", COUNT, "at which the Hessian is looked at", default=4)
    parser.add_runs("landscape", DEFAULTS)
    return parser.parse_runs(arguments)


main = command("landscape.study:Landscapes", parse)

if __name__ == "__main__":
    sys.exit(main())
