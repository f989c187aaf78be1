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
studies/recurrent/cells.py. Batch normalization has separate statistics for each time step there, up
to --max-steps.

Every cell is trained at each of --learning-rates. Prints tables, and writes JSON and a plot of the
validation accuracy to --out; validation images are the data's test images. Ctrl-C stops, and keeps
finished runs. With the same seed all cells use the same batches. See examples/README.md for what to
expect.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from common.arguments import COUNT, RATE, Parser
from common.interrupt import command

CELLS = ("lstm", "ln-lstm", "bn-lstm", "gru", "ln-gru", "bn-gru")
SEQUENCES = ("rows", "pixels", "permuted")
# Budgets are for two CPU cores.
RUN = {"steps": 1000, "eval_every": 50, "units": 100, "seeds": 1, "batch_size": 64}
DIGITS = {"steps": 600, "eval_every": 10, "units": 64, "seeds": 3, "batch_size": 64}


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    parser.add("--cells", None, "which", nargs="+", choices=CELLS, default=CELLS, metavar="CELL")
    sequence = "what is read at a step"
    parser.add("--sequence", None, sequence, choices=SEQUENCES, default="rows")
    parser.add("--max-steps", COUNT, "time steps with statistics of their own (default: all)")
    parser.add("--learning-rates", RATE, "of Adam", nargs="+", default=[0.002, 0.02])
    parser.add_runs("recurrent", {"digits": DIGITS, "mnist": RUN, "cifar10": RUN})
    options = parser.parse_args(arguments)
    if options.seeds is None and options.sequence != "rows":
        options.seeds = 1  # many more time steps: one has to do
    options.cells = list(dict.fromkeys(options.cells))
    options.learning_rates = list(dict.fromkeys(options.learning_rates))
    return parser.complete(options)


main = command("recurrent.study:Reading", parse)

if __name__ == "__main__":
    sys.exit(main())
