"""Substitutes for batch normalization, with which examples do not affect each other.

Trains a small VGG with each at several learning rates, and shows training and test accuracy against
the rate, and how far the logits of an example move, in training, when all other images of its batch
are replaced.

    python examples/without_batch.py                    # scikit-learn's digits: nothing to download
    python examples/without_batch.py --norms batch group --learning-rates 0.03 0.1 0.3
    python examples/without_batch.py --data cifar10 --data-dir DIR
"""

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
    raise SystemExit(main())
