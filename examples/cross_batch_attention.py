"""Attention with other documents as negatives in training, which do not distract it at inference.

Trains small language models on documents in two contexts: the previous one defines keys, the
current one asks for their values. "Memory" blocks also attend to the previous context of

    crossbatch         --contexts documents of the batch; the others are negatives (Tworkowski et
                       al. 2023, Focused Transformer, the training of LongLLaMA). This begins once
                       the model answers with its own context alone
    own context only   its own document

each with layer norm and with RMS norm. Then the contexts of more and more other documents fill the
memory. The program shows how often the value is still found, and how much of the attention goes to
its place.

    python examples/cross_batch_attention.py              # makes its documents itself
    python examples/cross_batch_attention.py --text FILE  # hides them in passages of your text
    python examples/cross_batch_attention.py --blocks local memory local

The model is in examples/common/memory.py, a pure function of params and memory; the documents are
in examples/common/lookup.py. With the same seed all models start from the same kernels and read the
same documents in the same order, as many with negatives as without. Prints tables, and writes JSON
and a plot to --out. Ctrl-C stops, and keeps finished runs. See examples/README.md for what to
expect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.arguments import Parser, number
from common.interrupt import run

NORMS, BLOCKS = ("layer norm", "RMS norm"), ("local", "memory")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(__doc__)
    count, rate = number(int, "a positive integer"), number(float, "a positive number")
    add = parser.add_argument
    add(
        "--norms",
        nargs="+",
        choices=NORMS,
        default=NORMS,
        metavar="NORM",
        help="'layer norm', 'RMS norm' (both)",
    )
    add(
        "--blocks",
        nargs="+",
        choices=BLOCKS,
        default=BLOCKS,
        metavar="BLOCK",
        help="of the model (local memory)",
    )
    add("--text", type=Path, metavar="FILE", help="to hide definitions and questions in")
    add(
        "--gap",
        type=count,
        default=4,
        metavar="N",
        help="bytes of it before each of them (default: %(default)s)",
    )
    add(
        "--pairs",
        type=count,
        default=8,
        metavar="N",
        help="keys that a document defines (default: %(default)s)",
    )
    add(
        "--contexts",
        type=count,
        default=16,
        metavar="N",
        help="that a document sees in training (default: %(default)s)",
    )
    add(
        "--distractors",
        type=count,
        default=127,
        metavar="N",
        help="in the largest memory (default: %(default)s)",
    )
    add(
        "--seeds",
        type=count,
        default=2,
        metavar="N",
        help="how often to train each model (default: %(default)s)",
    )
    add(
        "--steps",
        type=count,
        default=400,
        metavar="N",
        help="budget of each run (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=count,
        default=16,
        metavar="N",
        help="documents a step (default: %(default)s)",
    )
    add(
        "--test-batches",
        type=count,
        default=2,
        metavar="N",
        help="of 32 documents (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=rate,
        default=0.005,
        metavar="RATE",
        help="of Adam, at its peak (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results/cross_batch_attention"),
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.contexts > options.batch_size:
        parser.error(
            f"--contexts {options.contexts}: a batch has {options.batch_size}; raise --batch-size"
        )
    if "memory" not in options.blocks:
        parser.error("--blocks: no memory among them, so that no answer can be found")
    options.norms, options.blocks = list(dict.fromkeys(options.norms)), list(options.blocks)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    return run("crossbatch", parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
