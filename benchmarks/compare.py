#!/usr/bin/env python3
"""Shows the changes between two results of the same benchmark.

    python benchmarks/compare.py benchmarks/results/layers-cpu.json /tmp/layers-cpu.json
    python benchmarks/compare.py A B --peer flax.linen --all

For each row and figure of normjax (or of another peer), it prints A, B and their ratio if they
differ by more than the noise: times if their quartiles do not overlap; bytes, cycles and counts if
they differ at all. It also lists rows that only one file has. It exits with 1 if something got
worse by more than --tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from harness import records

COUNTED = (  # the same in every run, so any difference counts
    *("temporary_bytes", "peak_bytes", "kept_bytes", "bytes_accessed", "collectives"),
    *("estimated_cycles", "estimated_cycles_untaken"),  # static.py
    *("bytes_moved", "bytes_in_branches", "estimated_us", "estimated_us_in_branches"),
    *("kernels", "kernels_in_branches", "conditionals", "collectives_in_branches"),  # gpu_static.py
    *("calls", "functions", "files", "climbs", "calls_again"),  # overhead.py
    *("equations", "equations_with_gradients"),
)


class Change(NamedTuple):
    """One figure of one row in both files."""

    row: str
    figure: str
    before: float
    after: float
    beyond_noise: bool

    @property
    def ratio(self) -> float:
        """Returns the ratio of after to before."""
        return self.after / self.before if self.before else float("inf") if self.after else 1.0


def changes(a: dict[str, Any], b: dict[str, Any], peer: str) -> Iterator[Change]:
    """Yields every figure of the peer that both results have."""
    before, after = (
        {row["name"]: row["peers"].get(peer, {}) for row in each["rows"]} for each in (a, b)
    )
    for name in before:
        old, new = before[name], after.get(name, {})
        if "ms" in old and "ms" in new:
            apart = new["ms_low"] > old["ms_high"] or new["ms_high"] < old["ms_low"]
            yield Change(name, "ms", old["ms"], new["ms"], apart)
        for figure in COUNTED:
            if figure in old and figure in new:
                yield Change(name, figure, old[figure], new[figure], old[figure] != new[figure])


def missing(a: dict[str, Any], b: dict[str, Any], peer: str) -> Iterator[str]:
    """Lists the rows of the peer that only one result has, with the reason if it is known."""
    found = [
        {row["name"]: row["peers"].get(peer, {}).get("skipped") for row in each["rows"]}
        for each in (a, b)
    ]
    for own, other, which in ((found[0], found[1], "B"), (found[1], found[0], "A")):
        for name, reason in own.items():
            if name not in other:
                yield f"not in {which}: {name}"
            elif other[name] and not reason:
                yield f"not in {which}: {name}: {other[name]}"


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--peer", default="normjax")
    parser.add_argument("--all", action="store_true", help="also what did not change")
    parser.add_argument(
        "--tolerance", type=float, default=1.05, help="the ratio from which worse is an error"
    )
    options = parser.parse_args()
    a, b = records.read(options.a), records.read(options.b)
    for kind in ("machine", "versions"):
        for key, value in a[kind].items():
            if b[kind].get(key) != value and key != "load_before":
                print(f"{kind}, {key}: {value} -> {b[kind].get(key)}")
    print("\n".join(missing(a, b, options.peer)))
    seen = list(changes(a, b, options.peer))
    shown = [change for change in seen if options.all or change.beyond_noise]
    cells = [
        [c.row, c.figure, f"{c.before:.4g}", f"{c.after:.4g}", f"{c.ratio:.3f}x"] for c in shown
    ]
    print(
        records.table(["row", "figure", "A", "B", "B / A"], cells)
        if cells
        else f"{len(seen)} figures, none changed"
    )
    return int(any(change.beyond_noise and change.ratio > options.tolerance for change in seen))


if __name__ == "__main__":
    sys.exit(main())
