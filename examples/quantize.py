"""Fold batch normalization, then quantize to int8: accuracies before and after.

Trains a small convolutional network with batch normalization and shows its test accuracy four
times:

    float          as it was trained
    folded         each batch norm folded into the convolution before it, by normjax.deploy.fold
    folded, int8   folded, with kernels and activations quantized by qwix
    int8           quantized without folding: int8 convolutions, float32 batch norms

    python examples/quantize.py                         # scikit-learn's digits: nothing to download
    python examples/quantize.py --data mnist --data-dir DIR
    python examples/quantize.py --data cifar10 --data-dir DIR

qwix works on Flax modules, and `Folded.as_linen` makes one of the folded network, which is
quantized as any other (`quantized` in examples/studies/quantize/study.py, three lines).

Prints a table, and writes JSON to --out. Ctrl-C stops, and keeps finished runs. See
examples/README.md for what to expect. qwix is an extra: pip install 'normjax[examples,quantize]'.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from common.arguments import COUNT, Parser
from common.interrupt import command

RUN = {"seeds": 3, "steps": 300, "eval_every": 50, "batch_size": 64, "learning_rate": 0.1}


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    parser.add("--width", COUNT, "channels of the first stage", default=16)
    parser.add_runs("quantize", dict.fromkeys(("digits", "mnist", "cifar10"), RUN))
    return parser.parse_runs(arguments)


main = command("quantize.study:Quantize", parse)

if __name__ == "__main__":
    sys.exit(main())
