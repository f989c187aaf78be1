"""Kernels whose scale does not matter: how learning rate and weight decay set their direction.

Trains a small VGG with batch, layer and weight normalization, and without, by plain SGD, and
measures at each step how long each kernel is and by which angle the step turns it
(`nj.diagnostics.rotation`): without weight decay, from scaled kernels, and with decay.

    python examples/scale_invariance.py                 # scikit-learn's digits: nothing to download
    python examples/scale_invariance.py --data cifar10 --data-dir DIR
"""

from common.arguments import Program

RUN = {"steps": 3000, "eval_every": 100, "batch_size": 32, "learning_rate": 0.1}
CIFAR10 = {"steps": 4000, "eval_every": 100, "batch_size": 64, "learning_rate": 0.03}

program = Program("scale_invariance.study:Scaling", __doc__)
program.add_runs({"digits": RUN, "mnist": RUN, "cifar10": CIFAR10})
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
