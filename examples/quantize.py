"""Fold batch normalization, then quantize to int8: accuracies before and after.

Trains a small convolutional network with batch normalization and shows its test accuracy as it was
trained, folded by normjax.deploy.fold, folded and quantized by qwix, and quantized without folding.
qwix is an extra: pip install '.[examples,quantize]'. There is no plot.

    python examples/quantize.py                         # scikit-learn's digits: nothing to download
    python examples/quantize.py --data cifar10 --data-dir DIR
"""

from common.arguments import COUNT, Program

RUN = {"seeds": 3, "steps": 300, "eval_every": 50, "batch_size": 64, "learning_rate": 0.1}

program = Program("quantize.study:Quantize", __doc__)
program.add("--width", COUNT, "channels of the first stage", default=16)
program.add_runs(dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
