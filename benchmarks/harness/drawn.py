"""Draws rows with random shapes that no library was tuned for, and summarizes results.

Layers and dtypes alternate; all rows are forward and backward. For each row, a generator with the
seed draws:

- the rank, uniformly: 2 to 5 for batch norm, 2 or 3 for layer and RMS norm, 3 to 5 for group and
  instance norm;
- the elements of x, log-uniformly from 2^17 to 2^23: about 0.2 to 20 ms a call on two CPU cores;
- the features, log-uniformly from 32 to 2048, rounded to a multiple of 8 (of 32 for group norm,
  which has 32 groups);
- the examples, log-uniformly from 1 to 64; at rank 2 the remaining elements.

The other axes share the remaining elements; all have the same size, at least 4. A larger count
starts with the rows of a smaller count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice, product
from typing import Any

from . import peers
from .cases import DTYPES, GROUPS, Case, Layer

RANKS: dict[Layer, tuple[int, ...]] = {
    "batch": (2, 3, 4, 5),
    "layer": (2, 3),
    "rms": (2, 3),
    "group": (3, 4, 5),
    "instance": (3, 4, 5),
}
ELEMENTS, FEATURES, EXAMPLES = (2**17, 2**23), (32, 2048), (1, 64)

# shapes for which group norm was reported to be slower than Flax's; timed with the drawn rows, but
# not included in their means
REPORTED = tuple(
    Case("group", "forward+backward", shape, "bfloat16")
    for shape in ((16, 28, 28, 256), (8, 56, 56, 128), (64, 8, 8, 512))
)
NAMES = frozenset(case.name for case in REPORTED)


def draw(seed: int, count: int) -> list[Case]:
    """Returns `count` different rows."""
    return list(islice(dict.fromkeys(_endless(random.Random(seed), count)), count))


def _endless(rng: random.Random, count: int) -> Iterator[Case]:
    tries = 10 * count + 100  # more than enough, since few rows are drawn twice
    for layer, dtype in islice(cycle(product(RANKS, DTYPES)), tries):
        yield Case(layer, "forward+backward", _shape(rng, layer), dtype)


def _shape(rng: random.Random, layer: Layer) -> tuple[int, ...]:
    rank = rng.choice(RANKS[layer])
    elements, multiple = _log_uniform(rng, ELEMENTS), GROUPS if layer == "group" else 8
    features = multiple * max(1, round(_log_uniform(rng, FEATURES) / multiple))
    examples = round(_log_uniform(rng, EXAMPLES))
    if rank == 2:
        return (round(elements / features), features)
    others = rank - 2
    size = max(4, round((elements / features / examples) ** (1 / others)))
    return (examples, *[size] * others, features)


def _log_uniform(rng: random.Random, bounds: tuple[int, int]) -> float:
    return math.exp(rng.uniform(*map(math.log, bounds)))


def fastest(row: dict[str, Any]) -> tuple[str, float]:
    """Returns the fastest other library on JAX, and the ratio of its time to normjax's."""
    ratios = {
        name: got["ratio"]
        for name, got in row["peers"].items()
        if name != "normjax" and name in peers.LIBRARIES and "ratio" in got
    }
    name = min(ratios, key=lambda name: ratios[name], default="none")
    return name, ratios.get(name, math.nan)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Reports the ratios over the drawn rows by layer, and the rows on which normjax is slower."""
    measured = [row for row in rows if not math.isnan(fastest(row)[1])]
    drawn = [row for row in measured if row["name"] not in NAMES]
    lines = ["Times as multiples of normjax's, geometric means (above 1: normjax is ahead):"]
    lines.append(_means("drawn", drawn))
    for layer in RANKS:
        for dtype in DTYPES:
            kind = [
                row
                for row in drawn
                if (row["case"]["layer"], row["case"]["dtype"]) == (layer, dtype)
            ]
            lines += [_means(f"{layer} norm, {dtype}", kind)] if kind else []
    behind = [row for row in measured if fastest(row)[1] < 1]
    lines.append(f"Behind on {len(behind)} of {len(measured)} rows:" if behind else "Never behind.")
    for row in sorted(behind, key=lambda row: fastest(row)[1]):
        name, ratio = fastest(row)
        lines.append(
            f"  {row['name']}: {name} {ratio:.2f}x, {row['peers']['normjax']['ms']:.3g} ms"
        )
    return lines


def _means(title: str, rows: Sequence[dict[str, Any]]) -> str:
    parts = [f"fastest library on JAX {_mean(rows, lambda row: fastest(row)[1])}"]
    for name in ("flax.linen", "flax.nnx"):
        timed = [row for row in rows if "ratio" in row["peers"].get(name, {})]
        if timed:
            parts.append(
                f"{name} {_mean(timed, lambda row, name=name: row['peers'][name]['ratio'])}"
            )
    return f"  {title}, {len(rows)} rows: " + ", ".join(parts)


def _mean(rows: Iterable[dict[str, Any]], ratio: Callable[[dict[str, Any]], float]) -> str:
    logs = [math.log(ratio(row)) for row in rows]
    return f"{math.exp(sum(logs) / len(logs)):.3f}x" if logs else "not measured"
