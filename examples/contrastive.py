"""Contrastive training over devices, and what their statistics leak: SimCLR and synced batch norm.

Of two views of each image, one is the query and one the key, and each query should find its key
among the keys of all devices. If each device normalizes by its own statistics, queries and keys of
a device carry its statistics, which reveal the match (`nj.diagnostics.leakage`).

    python examples/contrastive.py                      # scikit-learn's digits: nothing to download
    python examples/contrastive.py --data cifar10 --data-dir DIR
"""

from common.arguments import SEVERAL, Program

DIGITS = {"steps": 400, "eval_every": 50, "batch_size": 32, "learning_rate": 0.003}
MNIST = {"steps": 2000, "eval_every": 200, "batch_size": 64, "learning_rate": 0.003}
CIFAR10 = {"steps": 20_000, "eval_every": 1000, "batch_size": 256, "learning_rate": 0.002}

program = Program("contrastive.study:Contrast", __doc__)
program.add("--devices", SEVERAL, "simulated", default=8)
program.add_runs(
    {
        "digits": DIGITS | {"seeds": 1, "labels": 100},
        "mnist": MNIST | {"seeds": 1, "labels": 1000},
        "cifar10": CIFAR10 | {"seeds": 1, "labels": 50_000},
    }
)
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
