"""Estimates the time that synced batch norm waits for other chips, from hops and bytes.

Nothing runs. An all-reduce of a few hundred bytes takes as long as its messages travel: on a torus
of X x Y chips a sum goes around each axis in two directions and back, X + Y hops. Bytes add what
the links need for them. Counts of collectives are those of a program that XLA has compiled
(`benchmarks/results/pod-v5e-256.json`, of benchmarks/pod.py).

    python benchmarks/sync_time.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "pod-v5e-256.json"
HOP = 1e-6  # seconds from chip to chip, software included; an assumption
LINK = 45e9  # bytes a second of a link of a v5e in one direction (Google: 1,600 Gbit/s in 4 links)
LAYERS, FEATURES = 53, 26_560  # of ResNet-50's batch norms, and their channels altogether
FORMS = ((2, 2), (4, 4), (8, 8), (16, 16))


def hops(form: tuple[int, int]) -> int:
    """Returns the hops of an all-reduce: half around each axis to sum, half to tell the sum."""
    return sum(2 * (size // 2) for size in form)


def latency(form: tuple[int, int]) -> float:
    """Returns the seconds of one small all-reduce."""
    return hops(form) * HOP


def main() -> None:
    """Prints a row for each form of a group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hop", type=float, default=HOP, help="seconds (default: %(default)s)")
    hop = parser.parse_args().hop
    collectives = json.loads(RESULTS.read_text())["normjax"]["collectives"]
    small = collectives - 1  # one carries the gradients
    sent = 2 * 2 * FEATURES * 4  # two moments in float32, forward and backward
    print(f"{small} small all-reduces, {sent / 1e6:.2f} MB in them, {hop * 1e6:g} us a hop")
    print("| group | chips | hops | us for one | ms a step | of them bytes, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for form in FORMS:
        one = hops(form) * hop
        carried = 2 * sent / (2 * len(form) * LINK)  # twice its size, over all links of a chip
        total = small * one + carried
        name, chips = "x".join(map(str, form)), form[0] * form[1]
        print(
            f"| {name} | {chips} | {hops(form)} | {one * 1e6:.0f} | {total * 1e3:.2f} | "
            f"{carried * 1e3:.2f} |"
        )


if __name__ == "__main__":
    main()
