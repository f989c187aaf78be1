"""Accuracy against batch size by normalization, as in figure 1 of Group Norm (Wu & He 2018).

Trains a small VGG on 8 simulated devices with 32, 16, 8, 4 and 2 images on each, and shows the test
error with

    batch            statistics of each device, as in data-parallel training
    ghost            statistics over 16 examples of the whole batch (virtual_batch_size)
    renorm           as "batch", corrected towards the running statistics; limits rise from batch
                     norm's
    sync             statistics over all devices (axis_name)
    group, layer, filter response    no statistics over examples

    python examples/small_batch.py                      # scikit-learn's digits: nothing to download
    python examples/small_batch.py --data mnist --data-dir DIR
    python examples/small_batch.py --data cifar10 --data-dir DIR --norms batch group --sizes 32 8 2

The protocol is the paper's: 8 devices, a learning rate linear in the batch size (--learning-rate is
for 32 images on each device), and the same number of examples at every batch size, so that --steps
is the number of steps of the largest batch. All start from the same kernels. Prints a table, and
writes JSON and a plot to --out. Ctrl-C stops, and keeps finished runs. See examples/README.md for
what to expect.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from common.arguments import Parser, number
from common.interrupt import command

NORMS = ("batch", "ghost", "renorm", "sync", "group", "layer", "filter response")
SIZES = [32, 16, 8, 4, 2]
RUN = {"seeds": 1, "steps": 200, "learning_rate": 0.1}


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    parser.add("--norms", None, "which to train", nargs="+", choices=NORMS, default=NORMS)
    size = number(int, "an integer above 1: one image has no batch", 2)
    parser.add("--sizes", size, "images a device", nargs="+", default=SIZES, metavar="N")
    parser.add_runs("small_batch", dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
    options = parser.parse_runs(arguments)
    odd = [size for size in options.sizes if size % 2]
    if "ghost" in options.norms and odd:
        needed = "8 times as many do not divide into ghost batches of 16; take even sizes"
        parser.error(f"--sizes {odd[0]}: {needed}")
    return options


main = command("small_batch.study:SmallBatch", parse)

if __name__ == "__main__":
    sys.exit(main())
