"""LSTM and GRU with layer and batch normalization, reading images row by row or pixel by pixel.

Trains an LSTM and a GRU, each plain, with layer normalization (Ba, Kiros & Hinton 2016) and with
batch normalization (Cooijmans et al. 2016), at each of --learning-rates, to name the digit on an
image. Each step reads one row of pixels, or one pixel.

    python examples/recurrent.py                    # scikit-learn's digits: nothing to download
    python examples/recurrent.py --sequence pixels  # 64 steps; or permuted: one random order
    python examples/recurrent.py --data mnist --data-dir DIR --sequence permuted  # 784 steps
"""

from argparse import Namespace

from common.arguments import COUNT, RATE, Program

CELLS = ("lstm", "ln-lstm", "bn-lstm", "gru", "ln-gru", "bn-gru")
SEQUENCES = ("rows", "pixels", "permuted")
# Budgets are for two CPU cores.
RUN = {"steps": 1000, "eval_every": 50, "units": 100, "seeds": 1, "batch_size": 64}
DIGITS = {"steps": 600, "eval_every": 10, "units": 64, "seeds": 3, "batch_size": 64}


def check(program: Program, options: Namespace) -> None:
    """Runs once what has many time steps; takes each cell and rate once."""
    if options.seeds is None and options.sequence != "rows":
        options.seeds = 1
    options.cells = list(dict.fromkeys(options.cells))
    options.learning_rates = list(dict.fromkeys(options.learning_rates))


program = Program("recurrent.study:Reading", __doc__, check)
program.add("--cells", None, "which", nargs="+", choices=CELLS, default=CELLS, metavar="CELL")
program.add("--sequence", None, "what a step reads", choices=SEQUENCES, default="rows")
program.add("--max-steps", COUNT, "time steps with statistics of their own (default: all)")
program.add("--learning-rates", RATE, "of Adam", nargs="+", default=[0.002, 0.02])
program.add_runs({"digits": DIGITS, "mnist": RUN, "cifar10": RUN})
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
