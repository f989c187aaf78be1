"""Fold batch normalization, then quantize to int8: accuracies before and after.

Trains a small convolutional network with batch normalization and shows its test accuracy four
times:

    float          as it was trained
    folded         each batch norm folded into the convolution before it, by normjax.deploy.fold
    folded, int8   folded, with kernels and activations quantized by qwix
    int8           quantized without folding: int8 convolutions, float32 batch norms

    python examples/quantize.py                         # scikit-learn's digits: nothing to download
    python examples/quantize.py --data cifar10 --data-dir DIR

qwix works on Flax modules, and `Folded.as_linen` makes one of the folded network, which is
quantized as any other (`quantized` in examples/studies/quantize/study.py, three lines). qwix is an
extra: pip install 'normjax[examples,quantize]'. There is no plot.
"""

import sys

from common.arguments import COUNT, Program

RUN = {"seeds": 3, "steps": 300, "eval_every": 50, "batch_size": 64, "learning_rate": 0.1}

program = Program("quantize.study:Quantize", __doc__)
program.add("--width", COUNT, "channels of the first stage", default=16)
program.add_runs(dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
parse, main = program.parse, program.main

if __name__ == "__main__":
    sys.exit(main())
