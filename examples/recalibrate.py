"""Recalibrates running statistics that do not fit: averaged weights, and shifted test images.

Trains a network with an exponential moving average (EMA) of its weights, and evaluates both with
running statistics, their EMA, and recalibrated ones, and the trained weights on test images with a
--shift (faint, inverted or noisy). Recalibrating is one line, and needs no labels:

    params, batch_stats = nj.recalibrate(apply_fn, (ema, batch_stats), batches)

    python examples/recalibrate.py                      # scikit-learn's digits: nothing to download
    python examples/recalibrate.py --data cifar10 --data-dir DIR
"""

from common.arguments import COUNT, RATE, SHIFTS, Program

RUN = {"seeds": 3, "steps": 600, "eval_every": 50, "batch_size": 32, "learning_rate": 0.1}

program = Program("recalibrate.study:Recalibrate", __doc__)
program.add("--shift", None, "of the test images", choices=SHIFTS, default="faint")
program.add("--ema", RATE, "that the average looks back", default=300, metavar="STEPS")
program.add("--calibrate", COUNT, "images to recalibrate on", default=1000)
program.add_runs(dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
