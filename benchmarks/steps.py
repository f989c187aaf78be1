#!/usr/bin/env python3
"""Measures time and memory of training steps that only differ in the normalization layer.

    python benchmarks/steps.py                                          # the sizes of this backend
    python benchmarks/steps.py --only transformer --peers normjax flax.linen none

The networks are the Inception and ResNets of the examples, ResNet-50, and a small transformer.
`none` has no normalization, so it shows the cost of everything else. The losses of the first three
steps are compared before anything is timed. The table has milliseconds, the ratio to normjax's, and
megabytes: temporary memory of the compiled program / arrays stored for the backward pass.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from harness import networks, records, timing, training


def main() -> None:
    """Runs the networks, writes JSON and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite", choices=["tiny", "cpu", "gpu"], help="default: that of the backend"
    )
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument(
        "--peers", nargs="+", choices=networks.PEERS, default=networks.PEERS, metavar="PEER"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1800, help="begin no network after that")
    parser.add_argument(
        "--out", type=pathlib.Path, help="default: benchmarks/results/steps-SUITE.json"
    )
    options = parser.parse_args()
    timing.keep_memory()
    name = options.suite or ("gpu" if jax.default_backend() == "gpu" else "cpu")
    rows = [network for network in networks.suite(name) if options.only in network.title]
    if not rows:
        parser.error(f"no network of the suite {name} has {options.only!r} in its name")
    results = records.header()
    results["rows"] = training.run(rows, options.peers, options.rounds, options.seconds)
    records.write(results, options.out or records.RESULTS / f"steps-{name}.json")
    print(records.skipped(results["rows"]) + "\n")
    print(records.peer_table(results["rows"], training.cell))


if __name__ == "__main__":
    main()
