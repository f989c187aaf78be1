#!/usr/bin/env python3
"""Lists the passes over x of compiled layers: which kernels read it, and which write an array.

    python benchmarks/passes.py cpu                   # with the process's CPU
    python benchmarks/passes.py v5e                   # with libtpu: pip install -e '.[bench]'
    .venv-gpu/bin/python benchmarks/passes.py h100    # with jax[cuda13], see make bench-gpu-static

Nothing is run. A pass is a kernel that reads or writes at least 1% of the bytes of x; the table has
its reads and writes in units of these bytes, in the order of the program. Passes in parentheses are
in branches of conditionals. `docs/pictures.py` draws the results, benchmarks/results/passes-*.json.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import gpu_programs
import h100
import jax
import static
import tpu
from harness import records
from harness.cases import Case

PEERS = ("formula", "flax.linen", "normjax")
CASES = [
    Case("batch", "forward", (256, 56, 56, 256), "bfloat16"),
    Case("layer", "forward", (8, 2048, 4096), "bfloat16"),
]
COMPILERS = {"cpu": "jaxlib", "h100": "jax[cuda13]", "v5e": "libtpu"}
SMALLEST = 0.01  # of the bytes of x: what is left out is of the size of the features


def main() -> None:
    """Compiles the layers for one target, writes JSON and prints the passes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=COMPILERS)
    parser.add_argument("--out", type=pathlib.Path, help="default: a file in benchmarks/results")
    options = parser.parse_args()
    try:
        devices = devices_of(options.target)
    except RuntimeError as error:
        package = COMPILERS[options.target]
        parser.error(f"the compiler for {options.target} is in {package}, not installed: {error}")
    results = records.header() | {"target": options.target}
    out = options.out or records.RESULTS / f"passes-{options.target}.json"
    rows = static.chosen(CASES, (), devices, "")
    static.run(rows, PEERS, figures, results, out)
    print(records.skipped(results["rows"]) + "\n")
    print(records.peer_table(results["rows"], cell))


def devices_of(target: str) -> Sequence[Any]:
    """Returns the devices to compile for, before JAX's backends start."""
    if target == "h100":
        return h100.devices()
    if target == "v5e":
        return tpu.devices("v5e:2x2")
    jax.config.update("jax_platforms", "cpu")
    return jax.devices()


def figures(compiled: Any) -> dict[str, Any]:
    """Returns the bytes that each kernel reads and writes."""
    found = gpu_programs.program(compiled.as_text())
    return {
        "steps": [[step.read, step.written] for step in found.steps],
        "steps_in_branches": [[step.read, step.written] for step in found.in_branches],
        "conditionals": found.conditionals,
    }


def passes(steps: Sequence[Sequence[int]], x_bytes: int) -> list[tuple[float, float]]:
    """Returns reads and writes of the kernels that touch x or y, in units of x."""
    return [
        (read / x_bytes, written / x_bytes)
        for read, written in steps
        if read + written >= SMALLEST * x_bytes
    ]


def cell(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell: the reads and writes of each pass."""

    def listed(key: str) -> str:
        found = passes(got[key], row["x_bytes"])
        return ", ".join(f"{read:.2f} -> {written:.2f}" for read, written in found)

    branches = listed("steps_in_branches")
    return listed("steps") + (f" ({branches})" if branches else "")


if __name__ == "__main__":
    main()
