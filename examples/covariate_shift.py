"""Internal covariate shift: does batch normalization reduce it, and does that help training?

Trains the network of Ioffe & Szegedy (2015), figure 1, without normalization, with batch norm, and
with noise after it that always shifts the inputs of every layer (Santurkar et al. 2018). Shows the
test accuracy, the inputs of a typical sigmoid (`nj.diagnostics.percentiles`), and how much an
update of the layers before it changes a layer's gradient
(`nj.diagnostics.internal_covariate_shift`).

    python examples/covariate_shift.py                  # scikit-learn's digits: nothing to download
    python examples/covariate_shift.py --data mnist --data-dir DIR  # the paper's images
"""

from common.arguments import Program

RUN = {"eval_every": 100, "batch_size": 60, "learning_rate": 0.1}

program = Program("covariate_shift.study:Shift", __doc__)
program.add_runs(
    {"digits": RUN | {"seeds": 3, "steps": 8000}, "mnist": RUN | {"seeds": 1, "steps": 10_000}}
)
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
