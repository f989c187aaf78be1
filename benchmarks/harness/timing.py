"""Times programs interleaved, so that drift of the machine affects all of them equally."""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Program(NamedTuple):
    """Something to time: `call` starts it, `wait` returns when its results are ready."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    # whether the device runs calls one after the other, however early they start
    queues: bool = False


def keep_memory() -> None:
    """Makes the C library keep freed memory instead of returning it to the system.

    Otherwise, large arrays would get new pages in every call, and the system would spend 90% of the
    time of a 64 MB copy on clearing them. Training programs do not have this cost for each layer.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
            library.mallopt(option, value)


def interleaved(
    programs: Mapping[str, Program], rounds: int = 11, sample_seconds: float = 5e-3
) -> dict[str, list[float]]:
    """Returns the milliseconds of a call in each round, by program.

    In each round, every program runs repeatedly for `sample_seconds`, in a new random order. An
    untimed call comes first, since caches would otherwise contain data of the previous program.
    """
    calls = {name: _calls(program, sample_seconds) for name, program in programs.items()}
    seen: dict[str, list[float]] = {name: [] for name in programs}
    orders = random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(list(programs), len(programs)):
            _seconds(programs[name], 1)
            seen[name].append(1e3 * _seconds(programs[name], calls[name]) / calls[name])
    return seen


def summary(own: list[float], base: list[float]) -> dict[str, float | int]:
    """Returns the median, the quartiles, and the median ratio to another program by round."""
    low, median, high = (
        statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
    )
    ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
    return {"ms": median, "ms_low": low, "ms_high": high, "ratio": ratio, "samples": len(own)}


def _calls(program: Program, sample_seconds: float) -> int:
    """Returns the number of calls in a sample; the first calls are a warm-up."""
    _seconds(program, 1)
    once = min(_seconds(program, 1) for _ in range(2))
    return max(1, min(1000, round(sample_seconds / once)))


def _seconds(program: Program, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        result = program.call()
        if not program.queues:
            program.wait(result)
    program.wait(program.call())
    return time.perf_counter() - start
