"""How many steps batch normalization saves: the experiments of the paper, on real images.

Trains the variants of Ioffe & Szegedy (2015), sections 4.1 and 4.2, and shows how many steps each
needs to reach the best test accuracy of the baseline, the same network without normalization:

    python examples/speedup.py                          # scikit-learn's digits: nothing to download
    python examples/speedup.py --data mnist --data-dir DIR  # the paper's section 4.1
    python examples/speedup.py --network inception --data cifar10 --data-dir DIR

Prints two tables. One is the paper's: relative to the baseline at the learning rate given. The
other is stricter: relative to the baseline at the best rate of a sweep. Writes JSON and a plot to
`--out`. Ctrl-C stops, and keeps finished variants.

The comparison is fair: with the same seed all variants start from the same kernels and use the same
batches in the same order. See examples/README.md for what to expect.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.interrupt import run
from common.options import Variant, parse

# The first of each is the baseline. The paper's MLP has sigmoids only, so that there the variants
# with sigmoids are the variants; the Inception has ReLUs, and the two with sigmoids show what
# normalization does for a saturating network.
VARIANTS = {
    "mlp": [
        Variant("Baseline", normalize=False, factor=1, activation="sigmoid"),
        Variant("BN-Baseline", normalize=True, factor=1, activation="sigmoid"),
        Variant("BN-x5", normalize=True, factor=5, activation="sigmoid"),
        Variant("BN-x30", normalize=True, factor=30, activation="sigmoid"),
    ],
    "inception": [
        Variant("Baseline", normalize=False, factor=1, activation="relu"),
        Variant("BN-Baseline", normalize=True, factor=1, activation="relu"),
        Variant("BN-x5", normalize=True, factor=5, activation="relu"),
        Variant("BN-x30", normalize=True, factor=30, activation="relu"),
        Variant("BN-x5-Sigmoid", normalize=True, factor=5, activation="sigmoid"),
        Variant("Baseline-Sigmoid", normalize=False, factor=1, activation="sigmoid"),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment that the command line asks for and returns the exit status."""
    options = parse(arguments, description=__doc__)
    return run("experiment", options, VARIANTS[options.network])


if __name__ == "__main__":
    sys.exit(main())
