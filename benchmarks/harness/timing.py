"""Times programs in turns, so that the machine's drift affects all of them equally."""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Program(NamedTuple):
    """Something to time: `call` starts it, `wait` returns when what it returned is there."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    # whether calls run one after the other on the device, however early they are started
    queues: bool = False


def keep_memory() -> None:
    """Has the C library keep freed memory instead of giving it back to the system.

    Where the arrays are large it would hand out new pages in every call, and 9 tenths of the time
    of a copy of 64 MB be the system's, clearing them. Programs that train do not pay that for each
    layer.
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

    In a round every program runs once, as often as fills `sample_seconds`, in an order drawn anew.
    A call that is not
    timed comes first: else a program would find in the caches what the one before it left there.
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
    """Returns how many calls fill a sample; the first ones warm up."""
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
