"""Internal covariate shift: does batch normalization reduce it, and does that help training?

Trains the network of Ioffe & Szegedy (2015), figure 1, three layers of 100 sigmoids on batches of
60, in three ways:

    without normalization
    with batch normalization      before each sigmoid
    with noise after it           with a new random mean and variance at each step, for each unit
                                  (Santurkar et al. 2018): the inputs of every layer always shift

    python examples/covariate_shift.py                  # scikit-learn's digits: nothing to download
    python examples/covariate_shift.py --data mnist --data-dir DIR  # the paper's images

and shows, over the steps of training, the test accuracy, the input's distribution of a typical
sigmoid in the last hidden layer (`nj.diagnostics.percentiles`), and how much an update of the
layers before it changes a layer's gradient (`nj.diagnostics.internal_covariate_shift`).
"""

import sys

from common.arguments import Program

RUN = {"eval_every": 100, "batch_size": 60, "learning_rate": 0.1}

program = Program("covariate_shift.study:Shift", __doc__)
program.add_runs(
    {"digits": RUN | {"seeds": 3, "steps": 8000}, "mnist": RUN | {"seeds": 1, "steps": 10_000}}
)
parse, main = program.parse, program.main

if __name__ == "__main__":
    sys.exit(main())
