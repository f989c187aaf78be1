"""Recalibrates running statistics that do not fit: averaged weights, and shifted test images.

Trains a network on digits, with an exponential moving average (EMA) of its weights, and evaluates

    as they are   the trained weights, and the EMA weights with three sets of statistics: the
                  trained weights' running ones, their EMA, and recalibrated on training images
    --shift       the trained weights on shifted test images (faint, inverted or noisy), with their
                  running statistics, and recalibrated on shifted training images without labels

    python examples/recalibrate.py                      # scikit-learn's digits: nothing to download
    python examples/recalibrate.py --data cifar10 --data-dir DIR

Recalibrating is one line (examples/studies/recalibrate/study.py):

    params, batch_stats = nj.recalibrate(apply_fn, (ema, batch_stats), batches)
"""

import sys

from common.arguments import COUNT, RATE, SHIFTS, Program

RUN = {"seeds": 3, "steps": 600, "eval_every": 50, "batch_size": 32, "learning_rate": 0.1}

program = Program("recalibrate.study:Recalibrate", __doc__)
program.add("--shift", None, "of the test images", choices=SHIFTS, default="faint")
program.add("--ema", RATE, "that the average looks back", default=300, metavar="STEPS")
program.add("--calibrate", COUNT, "images to recalibrate on", default=1000)
program.add_runs(dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
parse, main = program.parse, program.main

if __name__ == "__main__":
    sys.exit(main())
