#!/usr/bin/env python3
"""Compiles layers and training steps for an H100, and reads their costs; needs no GPU.

    make bench-gpu-static                                   # installs 5 GB in .venv-gpu, then runs
    .venv-gpu/bin/python benchmarks/gpu_static.py --only "layer norm" --peers normjax flax.linen

XLA's GPU compiler only needs a description of the device (`h100.py`). A cell of the first table has
the bytes that a program moves, in units of the bytes of x (in MB for a training step), and the
microseconds that XLA's cost model predicts. A cell of the second table has kernels / conditionals /
collectives / temporary MB. The sum over all branches of conditionals follows after a plus.

Bytes, kernels, conditionals and collectives are facts of the program (`gpu_programs.py` says how
they are counted). The microseconds are predictions of a model, not measurements. The model counts
an input of a fusion once for each of its reductions, and does not include libraries and tensor
cores, so the estimate of a training step excludes matrix products and convolutions. Use them only
to compare programs.

The backward pass alone is a separate program. It reads the residuals that JAX stores in the forward
pass, so it has float32 arrays that XLA may not store if it compiles both passes as one program.

Rows on 8 devices show the program of one device.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import gpu_programs
import h100
import static
from harness import networks, records
from harness.cases import suite

PEERS = ("normjax", "flax.linen", "flax.nnx", "haiku", "equinox", "formula")
DEVICES = 8


def main() -> None:
    """Compiles all rows for all peers, writes JSON and prints the tables."""
    parser = static.arguments(__doc__, ["tiny", "gpu_static"], "gpu_static", (*PEERS, "none"))
    parser.set_defaults(peers=list(PEERS))
    options = parser.parse_args()
    try:
        devices = h100.devices(DEVICES)
    except RuntimeError as error:
        parser.error(f"jax[cuda13] is needed, see `make bench-gpu-static`: {error}")
    layers, steps = suite(options.suite), networks.suite(options.suite)
    rows = static.chosen(layers, steps, devices, options.only)
    if not rows:
        parser.error(f"no row has {options.only!r} in its name")
    results = records.header() | {"target": devices[0].device_kind}
    out = options.out or records.RESULTS / "gpu-static-h100.json"
    static.run(rows, options.peers, gpu_programs.figures, results, out)
    print(records.skipped(results["rows"]) + "\n")
    print(records.peer_table(results["rows"], cell) + "\n")
    print(records.peer_table(results["rows"], cell_of_counts))


def cell(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell with bytes moved and estimated time; branches follow after a plus."""
    unit, title = (row["x_bytes"], "") if "x_bytes" in row else (1e6, " MB")
    moved, estimated = f"{got['bytes_moved'] / unit:,.2f}", f"{got['estimated_us']:,.1f}"
    if got["kernels_in_branches"]:
        moved += f" + {got['bytes_in_branches'] / unit:,.2f}"
        estimated += f" + {got['estimated_us_in_branches']:,.1f}"
    return f"{moved}{title}, {estimated} us"


def cell_of_counts(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell with kernels, conditionals, collectives and temporary MB."""
    apart = got["collectives_in_branches"]
    counts = [
        plus(got["kernels"], got["kernels_in_branches"]),
        str(got["conditionals"]),
        plus(got["collectives"] - apart, apart),
    ]
    return f"{' / '.join(counts)} / {got['temporary_bytes'] / 1e6:,.4g} MB"


def plus(count: int, in_branches: int) -> str:
    """Returns a count as text, with the count in branches after a plus."""
    return f"{count} + {in_branches}" if in_branches else str(count)


if __name__ == "__main__":
    main()
