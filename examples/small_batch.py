"""Accuracy against batch size by normalization, as in figure 1 of Group Norm (Wu & He 2018).

Trains a small VGG with seven normalizations on 8 simulated devices with 32, 16, 8, 4 and 2 images
on each, and shows the test error. The protocol is the paper's: a learning rate linear in the batch
size (--learning-rate is for 32 images on each device), and the same number of examples at every
batch size (--steps is for the largest).

    python examples/small_batch.py                      # scikit-learn's digits: nothing to download
    python examples/small_batch.py --data cifar10 --data-dir DIR --norms batch group --sizes 32 8 2
"""

from argparse import Namespace

from common.arguments import Program, number

NORMS = ("batch", "ghost", "renorm", "sync", "group", "layer", "filter response")
RUN = {"seeds": 1, "steps": 200, "learning_rate": 0.1}
SIZE = number(int, "an integer above 1: one image has no batch", 2)


def check(program: Program, options: Namespace) -> None:
    """Exits for batches that have no ghost batches."""
    odd = [size for size in options.sizes if size % 2]
    if "ghost" in options.norms and odd:
        needed = "8 times as many do not divide into ghost batches of 16; take even sizes"
        program.error(f"--sizes {odd[0]}: {needed}")


program = Program("small_batch.study:SmallBatch", __doc__, check)
program.add("--norms", None, "which to train", nargs="+", choices=NORMS, default=NORMS)
sizes = [32, 16, 8, 4, 2]
program.add("--sizes", SIZE, "images a device", nargs="+", default=sizes, metavar="N")
program.add_runs(dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
