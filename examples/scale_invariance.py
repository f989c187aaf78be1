"""Kernels whose scale does not matter: how learning rate and weight decay set their direction.

Trains a small VGG on digits with batch, layer and weight normalization, and without, by plain SGD,
and measures at each step how long each kernel is and by which angle the step turns it
(normjax.diagnostics.rotation).

    python examples/scale_invariance.py                 # scikit-learn's digits: nothing to download
    python examples/scale_invariance.py --data mnist --data-dir DIR
    python examples/scale_invariance.py --data cifar10 --data-dir DIR

The program shows three properties of kernels before normalization (van Laarhoven 2017; Li & Arora
2020; Kosson et al. 2024):

    growth      without weight decay their norms grow, as each gradient is orthogonal to them, so
                the learning rate of their direction, lr / norm^2, falls
    scaled      with kernels times c, lr times c^2 and wd / c^2, the network takes the same path,
                bit for bit
    rotation    from the same initialization, only the product of lr and wd matters in the long run:
                the angle of a step approaches sqrt(2 lr wd), and the loss one curve

Learning rate and decay apply to the kernels before normalization; all other parameters are trained
at one rate without decay. Prints a table of what was reported and what was measured, and writes
JSON and a plot to --out. Ctrl-C stops, and keeps finished runs. See examples/README.md for what to
expect.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from common.arguments import Parser
from common.interrupt import command

RUN = {"steps": 3000, "eval_every": 100, "batch_size": 32, "learning_rate": 0.1}
CIFAR10 = {"steps": 4000, "eval_every": 100, "batch_size": 64, "learning_rate": 0.03}


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    parser.add_runs("scale_invariance", {"digits": RUN, "mnist": RUN, "cifar10": CIFAR10})
    return parser.parse_runs(arguments)


main = command("scale_invariance.study:Scaling", parse)

if __name__ == "__main__":
    sys.exit(main())
