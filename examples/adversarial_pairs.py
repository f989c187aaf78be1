"""One network, two sets of statistics: clean and adversarial images in one training.

Trains a network on clean images and on images that an adversary has changed, each pixel by at most
--radius, in four ways, which share more or less of the normalization; and evaluates it on clean and
on attacked test images, with either set of statistics at inference.

    python examples/adversarial_pairs.py                # scikit-learn's digits: nothing to download
    python examples/adversarial_pairs.py --data cifar10 --data-dir DIR
"""

from common.arguments import COUNT, Program

RUN = {"seeds": 1, "eval_every": 50, "batch_size": 64, "learning_rate": 0.05}

program = Program("adversarial_pairs.study:Pairs", __doc__)
steps = "of the adversary in training; twice that in the test"
program.add("--attack-steps", COUNT, steps, default=4)
program.add_runs(
    {
        "digits": RUN | {"seeds": 3, "steps": 300, "radius": 0.15},
        "mnist": RUN | {"steps": 1000, "radius": 0.2},
        "cifar10": RUN | {"steps": 5000, "radius": 8 / 255},
    }
)
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
