"""Kernels whose scale does not matter: how learning rate and weight decay set their direction.

Trains a small VGG on digits with batch, layer and weight normalization, and without, by plain SGD,
and measures at each step how long each kernel is and by which angle the step turns it
(`nj.diagnostics.rotation`).

    python examples/scale_invariance.py                 # scikit-learn's digits: nothing to download
    python examples/scale_invariance.py --data cifar10 --data-dir DIR

The program shows three properties of kernels before normalization (van Laarhoven 2017; Li & Arora
2020; Kosson et al. 2024):

    growth      without weight decay their norms grow, as each gradient is orthogonal to them, so
                the learning rate of their direction, lr / norm^2, falls
    scaled      with kernels times c, lr times c^2 and wd / c^2, the network takes the same path,
                bit for bit
    rotation    from the same initialization, only the product of lr and wd matters in the long run:
                the angle of a step approaches sqrt(2 lr wd), and the loss one curve

Learning rate and decay apply to the kernels before normalization; all other parameters are trained
at one rate without decay.
"""

import sys

from common.arguments import Program

RUN = {"steps": 3000, "eval_every": 100, "batch_size": 32, "learning_rate": 0.1}
CIFAR10 = {"steps": 4000, "eval_every": 100, "batch_size": 64, "learning_rate": 0.03}

program = Program("scale_invariance.study:Scaling", __doc__)
program.add_runs({"digits": RUN, "mnist": RUN, "cifar10": CIFAR10})
parse, main = program.parse, program.main

if __name__ == "__main__":
    sys.exit(main())
