#!/usr/bin/env python3
"""Times every layer against its peers, on whatever backend there is, and against what its memory allows.

    python benchmarks/layers.py                    # the suite of this backend: minutes on a CPU
    python benchmarks/layers.py --suite sync       # synced batch norm, on 8 CPU devices
    python benchmarks/layers.py --suite tiny --rounds 3 --only "batch norm" --peers normjax
    flax.linen

A row is a layer in a mode, at a shape and dtype of a real network. Each peer's y and gradients are
compared with normjax's before it is timed; peers that are absent, unable or wrong are named at the
end. The floor is the bytes that must move (harness/cases.py) at the bandwidth of a copy of x's
bytes, which takes its turn with the peers. Medians, quartiles and bytes go to benchmarks/results/;
the table is in milliseconds, with the ratio to normjax's.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from harness import records, rows, timing
from harness.cases import suite


def main() -> None:
    """Runs a suite, writes JSON and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite", choices=["tiny", "cpu", "gpu", "sync"], help="default: that of the backend"
    )
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument(
        "--peers", nargs="+", choices=rows.PEERS, default=rows.PEERS, metavar="PEER"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1800, help="begin no row after that")
    parser.add_argument(
        "--out", type=pathlib.Path, help="default: benchmarks/results/layers-SUITE.json"
    )
    options = parser.parse_args()
    if options.suite == "sync":
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_num_cpu_devices", 8)
    timing.keep_memory()
    name = options.suite or ("gpu" if jax.default_backend() == "gpu" else "cpu")
    cases = [case for case in suite(name) if options.only in case.name]
    if not cases:
        parser.error(f"no row of the suite {name} has {options.only!r} in its name")
    results = records.header()
    results["rows"] = rows.run(cases, options.peers, options.rounds, options.seconds)
    records.write(results, options.out or records.RESULTS / f"layers-{name}.json")
    print(records.skipped(results["rows"]) + "\n")
    print(records.peer_table(results["rows"], rows.cell))


if __name__ == "__main__":
    main()
