"""Attention with other documents as negatives in training, which do not distract it at inference.

Trains small language models on documents in two contexts: the previous one defines keys, the
current one asks for their values. Blocks with memory see the previous context, with and without
those of other documents (Tworkowski et al. 2023, Focused Transformer, the training of LongLLaMA).
Shows how often the value is still found among the contexts of more and more other documents.

    python examples/cross_batch_attention.py              # makes its documents itself
    python examples/cross_batch_attention.py --text FILE  # hides them in passages of your text
    python examples/cross_batch_attention.py --blocks local memory local
"""

from argparse import Namespace
from pathlib import Path

from common.arguments import COUNT, RATE, Program

NORMS, BLOCKS = ("layer norm", "RMS norm"), ("local", "memory")


def check(program: Program, options: Namespace) -> None:
    """Exits for options that do not fit together; takes each norm once."""
    if options.contexts > options.batch_size:
        has = f"a batch has {options.batch_size}; raise --batch-size"
        program.error(f"--contexts {options.contexts}: {has}")
    if "memory" not in options.blocks:
        program.error("--blocks: no memory among them, so that no answer can be found")
    options.norms, options.blocks = list(dict.fromkeys(options.norms)), list(options.blocks)


program = Program("cross_batch_attention.study:CrossBatch", __doc__, check)
add = program.add
add("--norms", None, "which", nargs="+", choices=NORMS, default=NORMS, metavar="NORM")
add("--blocks", None, "of the model", nargs="+", choices=BLOCKS, default=BLOCKS, metavar="BLOCK")
add("--text", Path, "to hide definitions and questions in", metavar="FILE")
add("--gap", COUNT, "bytes of it before each of them", default=4)
add("--pairs", COUNT, "keys that a document defines", default=8)
add("--contexts", COUNT, "that a document sees in training", default=16)
add("--distractors", COUNT, "in the largest memory", default=127)
add("--seeds", COUNT, "how often to train each model", default=2)
add("--steps", COUNT, "budget of each run", default=400)
add("--batch-size", COUNT, "documents a step", default=16)
add("--test-batches", COUNT, "of 32 documents", default=2)
add("--learning-rate", RATE, "of Adam, at its peak", default=0.005)
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
