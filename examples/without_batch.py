"""Substitutes for batch normalization, with which examples do not affect each other.

Trains a small VGG at several learning rates, and shows training and test accuracy against the rate,
with

    none                     biases only, as the lower end
    batch                    batch norm, the only one whose output depends on other examples
    group                    group norm (Wu & He 2018)
    weight norm              with data-dependent initialization (Salimans & Kingma 2016)
    weight standardization   scaled, with ReLU's gain (Brock, De & Smith 2021)
    dynamic tanh             (Zhu et al. 2025)

    python examples/without_batch.py                    # scikit-learn's digits: nothing to download
    python examples/without_batch.py --norms batch group --learning-rates 0.03 0.1 0.3
    python examples/without_batch.py --data cifar10 --data-dir DIR

The column "others" of the table is how far the logits of an example move, in training, when all
other images of its batch are replaced. All start from the same kernels and use the same batches.
"""

import sys

from common.arguments import RATE, Program

NORMS = ("none", "batch", "group", "weight norm", "weight standardization", "dynamic tanh")
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]

program = Program("without_batch.study:WithoutBatch", __doc__)
program.add("--norms", None, "which to train", nargs="+", choices=NORMS, default=NORMS)
program.add("--learning-rates", RATE, "of SGD", nargs="+", default=RATES)
program.add_runs(
    {
        "digits": {"seeds": 3, "steps": 300, "batch_size": 32},
        "mnist": {"seeds": 1, "steps": 600, "batch_size": 32},
        "cifar10": {"seeds": 1, "steps": 2000, "batch_size": 64},
    }
)
parse, main = program.parse, program.main

if __name__ == "__main__":
    sys.exit(main())
