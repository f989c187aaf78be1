"""Estimates the communication time of synced batch norm from hops and bytes.

Nothing runs. The time of an all-reduce of a few hundred bytes is its latency: on a torus of X x Y
chips, a sum travels around each axis in both directions and back, which is X + Y hops. The transfer
time of the bytes is added. The numbers of collectives are from a program that XLA has compiled
(`benchmarks/results/pod-v5e-256.json`, by benchmarks/pod.py).

    python benchmarks/sync_time.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "pod-v5e-256.json"
HOP = 1e-6  # seconds from chip to chip, including software; an assumption
LINK = 45e9  # bytes per second of a v5e link in one direction (Google: 1,600 Gbit/s in 4 links)
LAYERS, FEATURES = 53, 26_560  # of ResNet-50: its batch norms, and the sum of their channels
FORMS = ((2, 2), (4, 4), (8, 8), (16, 16))


def hops(form: tuple[int, int]) -> int:
    """Returns the hops of an all-reduce: half around each axis to reduce, half to broadcast."""
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
    small = collectives - 1  # one of them reduces the gradients
    sent = 2 * 2 * FEATURES * 4  # two moments in float32, forward and backward
    print(f"{small} small all-reduces, {sent / 1e6:.2f} MB in them, {hop * 1e6:g} us a hop")
    print("| group | chips | hops | us for one | ms a step | of them bytes, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for form in FORMS:
        one = hops(form) * hop
        carried = 2 * sent / (2 * len(form) * LINK)  # twice the size, over all links of a chip
        total = small * one + carried
        name, chips = "x".join(map(str, form)), form[0] * form[1]
        print(
            f"| {name} | {chips} | {hops(form)} | {one * 1e6:.0f} | {total * 1e3:.2f} | "
            f"{carried * 1e3:.2f} |"
        )


if __name__ == "__main__":
    main()
