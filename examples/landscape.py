"""The loss landscape with and without batch normalization: how far gradients can be trusted.

Trains a small VGG, without normalization and with batch normalization, by plain SGD at several
learning rates, and measures on the way what figure 4 of Santurkar et al. (2018) shows, along the
gradient of a training batch (`nj.diagnostics.landscape`), and at some checkpoints the largest
eigenvalue of the Hessian, over all directions (`nj.diagnostics.hessian_eigenvalue`).

    python examples/landscape.py                                # digits: nothing to download
    python examples/landscape.py --data cifar10 --data-dir DIR  # the paper's images
"""

from common.arguments import COUNT, RATE, Program

program = Program("landscape.study:Landscapes", __doc__)
program.add("--learning-rates", RATE, "of SGD", nargs="+", default=[0.1, 0.5])
program.add("--checkpoints", COUNT, "at which the Hessian is looked at", default=4)
program.add_runs(
    {
        "digits": {"seeds": 2, "steps": 300, "eval_every": 10, "batch_size": 32},
        "mnist": {"seeds": 1, "steps": 300, "eval_every": 10, "batch_size": 32},
        "cifar10": {"seeds": 1, "steps": 1000, "eval_every": 25, "batch_size": 128},
    }
)
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
