"""LSTM and GRU with layer and batch normalization, reading images row by row or pixel by pixel.

Trains an LSTM and a GRU, each plain, with layer normalization (Ba, Kiros & Hinton 2016) and with
batch normalization (Cooijmans et al. 2016), to name the digit on an image. Each step reads one row
of pixels, or one pixel:

    python examples/recurrent.py                    # scikit-learn's digits: nothing to download
    python examples/recurrent.py --sequence pixels  # 64 steps; or permuted: one random order
    python examples/recurrent.py --data mnist --data-dir DIR
    python examples/recurrent.py --data mnist --data-dir DIR --sequence permuted  # 784 steps

The last one is the task of Cooijmans et al. A mask hides blank rows or pixels before and after a
digit, so that sequences start and end at different steps. The cells are in
examples/common/cells.py. Batch normalization has separate statistics for each time step there, up
to --max-steps.

Every cell is trained at each of --learning-rates. Prints tables, and writes JSON and a plot of the
validation accuracy to --out; validation images are the data's test images. Ctrl-C stops, and keeps
finished runs. With the same seed all cells use the same batches. See examples/README.md for what to
expect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.arguments import Parser, number
from common.interrupt import run

CELLS = ("lstm", "ln-lstm", "bn-lstm", "gru", "ln-gru", "bn-gru")

SEQUENCES = ("rows", "pixels", "permuted")

# By data: steps, steps between evaluations, units, seeds. Budgets are for two CPU cores. Pixel by
# pixel, with many more time steps, one seed has to do.
DEFAULTS = {"digits": (600, 10, 64, 3), "mnist": (1000, 50, 100, 1), "cifar10": (1000, 50, 100, 1)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    count, rate = number(int, "a positive integer"), number(float, "a positive number")
    parser.add_data(tuple(DEFAULTS))
    add = parser.add_argument
    add(
        "--cells",
        nargs="+",
        choices=CELLS,
        default=CELLS,
        metavar="CELL",
        help=f"of {', '.join(CELLS)} (default: all)",
    )
    add(
        "--sequence",
        choices=SEQUENCES,
        default="rows",
        help="what is read at a step (default: %(default)s)",
    )
    add(
        "--units",
        type=count,
        metavar="N",
        help="of the state (default: 64, for mnist and cifar10 100)",
    )
    add(
        "--max-steps",
        type=count,
        metavar="N",
        help="time steps with statistics of their own (default: all)",
    )
    add(
        "--seeds",
        type=count,
        metavar="N",
        help="how often to train each cell; table and plot show medians",
    )
    add("--steps", type=count, metavar="N", help="budget of each run")
    add("--eval-every", type=count, metavar="N", help="steps between two evaluations")
    add(
        "--batch-size",
        type=number(int, "an integer above 1", 2),
        default=64,
        metavar="N",
        help="examples a step",
    )
    add(
        "--learning-rates",
        type=rate,
        nargs="+",
        default=[0.002, 0.02],
        metavar="RATE",
        help="of Adam (default: 0.002 0.02)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results/recurrent"),
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    parser.check_data(options)
    options.cells, options.learning_rates = (
        list(dict.fromkeys(given)) for given in (options.cells, options.learning_rates)
    )
    for name, value in zip(
        ("steps", "eval_every", "units", "seeds"), DEFAULTS[options.data], strict=True
    ):
        if getattr(options, name) is None:
            setattr(options, name, 1 if name == "seeds" and options.sequence != "rows" else value)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    return run("reading", parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
