#!/usr/bin/env python3
"""Times every layer against its peers and its memory floor, on this machine's backend.

    python benchmarks/layers.py                    # the suite of this backend: minutes on a CPU
    python benchmarks/layers.py --suite sync       # synced batch norm, on 8 CPU devices
    python benchmarks/layers.py --suite drawn --seed 7 --count 40   # random shapes
    python benchmarks/layers.py --suite tiny --only "batch norm" --peers normjax flax.linen

A row is a layer in a mode, with a shape and dtype of a real network. Before a peer is timed, its y
and gradients are compared with normjax's; peers that are absent, unable or incorrect are listed at
the end. The memory floor is the bytes that must move (harness/cases.py) divided by the bandwidth of
a copy of x, which is timed together with the peers. Medians, quartiles and bytes are written to
benchmarks/results/; the table has milliseconds, and ratios to normjax's.

The suite `drawn` draws random shapes (see harness/drawn.py), times the libraries on JAX, and ends
with geometric means and the rows on which normjax is slower. Three shapes for which group norm was
reported to be slower come first; they are not included in the means.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from harness import drawn, peers, records, rows, timing
from harness.cases import suite


def main() -> None:
    """Runs a suite, writes JSON and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite",
        choices=["tiny", "cpu", "gpu", "sync", "drawn"],
        help="default: that of the backend",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the suite drawn")
    parser.add_argument("--count", type=int, default=20, help="rows of the suite drawn")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument(
        "--peers", nargs="+", choices=rows.PEERS, metavar="PEER", help="default: all of the suite"
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
    drawing = {"seed": options.seed, "count": options.count} if name == "drawn" else {}
    cases = [*drawn.REPORTED, *drawn.draw(**drawing)] if drawing else suite(name)
    cases = [case for case in cases if options.only in case.name]
    if not cases:
        parser.error(f"no row of the suite {name} has {options.only!r} in its name")
    chosen = options.peers or (peers.LIBRARIES if drawing else rows.PEERS)
    file = f"layers-drawn-{options.seed}.json" if drawing else f"layers-{name}.json"
    results = records.header() | drawing
    results["rows"] = rows.run(cases, chosen, options.rounds, options.seconds)
    records.write(results, options.out or records.RESULTS / file)
    print(records.skipped(results["rows"]) + "\n")
    print(records.peer_table(results["rows"], rows.cell))
    if drawing:
        print("\n" + "\n".join(drawn.summary(results["rows"])))


if __name__ == "__main__":
    main()
