#!/usr/bin/env python3
"""Measures layers, their peers and floors, and whole steps on a GPU, in at most 8 minutes.

    python benchmarks/gpu.py                 # on the GPU
    python benchmarks/gpu.py --dry-run       # a test of the script: tiny shapes on the CPU

It needs this repository (not installed), JAX with CUDA, and the dependencies of normjax, but no
network. Missing peers are listed. Results are checked before they are timed. JSON is written after
each half, so that an interrupted call keeps the first half; the tables are printed last.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

START = time.monotonic()
# PyTorch also needs memory
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("KERAS_BACKEND", "jax")
if "--dry-run" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax  # noqa: E402 (once the platform is chosen)
from harness import networks, records, rows, timing, training  # noqa: E402
from harness.cases import suite  # noqa: E402

LAYERS_SHARE = 0.7  # of the time
# a ResNet-50 takes half a minute to compile for each peer
STEP_PEERS = ("normjax", "flax.linen", "none")


def main() -> None:
    """Runs layers and steps, writes JSON and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--seconds", type=float, default=390, help="begin no row after that; what is begun is ended"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/gpu.json")
    parser.add_argument(
        "--peers", nargs="+", choices=rows.PEERS, default=rows.PEERS, metavar="PEER"
    )
    options = parser.parse_args()
    if not options.dry_run and jax.default_backend() != "gpu":
        parser.error(
            f"JAX sees no GPU, but {jax.devices()}. Install jax[cuda13], or give --dry-run"
        )
    timing.keep_memory()
    size = "tiny" if options.dry_run else "gpu"
    out = options.out or records.RESULTS / f"gpu{'-dry-run' * options.dry_run}.json"
    results = records.header()
    share = LAYERS_SHARE * options.seconds
    results["rows"] = layers = rows.run(suite(size), options.peers, options.rounds, share)
    records.write(results, out)
    left = options.seconds - (time.monotonic() - START)
    names = [name for name in STEP_PEERS if name in (*options.peers, "none")]
    steps = training.run(networks.suite(size), names, options.rounds, left)
    results["rows"] = layers + steps
    results["seconds"] = round(time.monotonic() - START, 1)
    records.write(results, out)
    print(f"{records.skipped(layers)}\n{records.skipped(steps)}\n")
    print(records.peer_table(layers, rows.cell) + "\n")
    print(records.peer_table(steps, training.cell))


if __name__ == "__main__":
    main()
