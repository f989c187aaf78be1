"""Runs a case: builds every peer's program, checks its results, and times correct programs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import peers, programs, torch_peers
from .cases import Case, arrays_moved
from .programs import Built, Operands
from .records import first_line
from .timing import Program, interleaved, summary

PEERS = (*peers.PEERS, *torch_peers.PEERS)
TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 3e-2,
}  # relative to the largest value: orders of summation differ slightly, mistakes are of order 1
COPY = "copy"


class Building:
    """Builds programs; a peer whose programs exceed the time limit is skipped from then on.

    PyTorch's compiler takes seconds per layer, other compilers a fraction of a second.
    """

    def __init__(self, limit: float):
        self.limit, self.spent = limit, dict.fromkeys(PEERS, 0.0)

    def make(self, name: str, case: Case, given: Operands) -> Built:
        """Returns a peer's program; raises Unable if its time limit is exceeded."""
        if self.spent[name] > self.limit:
            raise peers.Unable(
                f"its programs took more than {self.limit:.0f} s to make: a sixth of the time"
            )
        start = time.monotonic()
        try:
            return (torch_peers if name in torch_peers.PEERS else programs).build(name, case, given)
        finally:
            self.spent[name] += time.monotonic() - start


def run(
    cases: Sequence[Case], names: Iterable[str], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Returns the rows of cases; prints and skips those that do not start in time."""
    end, rows = time.monotonic() + seconds, []
    building = Building(seconds / 6)
    for i, case in enumerate(cases):
        if time.monotonic() > end:
            print(
                f"out of time after {seconds:.0f} s; not run: "
                + "; ".join(each.name for each in cases[i:])
            )
            break
        rows.append(row(case, list(names), rounds, building))
        print(f"{i + 1}/{len(cases)} {case.name}: " + line(rows[-1]), flush=True)
    return rows


def row(case: Case, names: list[str], rounds: int, building: Building) -> dict[str, Any]:
    """Returns each peer's milliseconds, bytes and error for a case, or why it was skipped."""
    built, found = _checked(case, names, building)
    timed = {name: each.program for name, each in built.items()}
    times = interleaved(timed | {COPY: _copy(case)}, rounds)
    for name, each in built.items():
        found[name] |= summary(times[name], times["normjax"]) | each.memory
    copied = summary(times[COPY], times[COPY])["ms"]
    bandwidth = 2 * case.nbytes / copied / 1e6
    floor = arrays_moved(case) / 2 * copied
    return {
        "name": case.name,
        "case": case._asdict(),
        "floor_ms": floor,
        "copy_GBps": bandwidth,
        "peers": found,
    }


def line(row: dict[str, Any]) -> str:
    """Returns the results of a row as a line."""
    own = row["peers"]["normjax"]
    ratios = [
        f"{name} {got['ratio']:.2f}x"
        for name, got in row["peers"].items()
        if "ratio" in got and got is not own
    ]
    return f"floor {row['floor_ms']:.3g} ms, normjax {own['ms']:.3g} ms; " + ", ".join(ratios)


def cell(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell with a peer's time and its ratio to normjax's."""
    ratio = "" if got is row["peers"]["normjax"] else f" ({got['ratio']:.2f}x)"
    return f"{got['ms']:.3g}{ratio}"


def _checked(
    case: Case, names: list[str], building: Building
) -> tuple[dict[str, Built], dict[str, Any]]:
    """Builds the programs; absent, unable or incorrect peers only get a reason."""
    given = Operands(case)
    built = {"normjax": programs.build("normjax", case, given)}
    reference = built["normjax"].outputs()
    if not all(np.isfinite(value).all() for value in reference.values()):
        raise ArithmeticError(f"normjax: {case.name}: not all values are finite")
    found: dict[str, Any] = {"normjax": {}}
    for name in names:
        if name == "normjax":
            continue
        try:
            made = building.make(name, case, given)
            errors = programs.relative_errors(made.outputs(), reference)
        except ImportError as error:
            found[name] = {"skipped": f"not installed: {first_line(error)}"}
        except peers.Unable as error:
            found[name] = {"skipped": f"unable: {first_line(error)}"}
        # any error: a peer that fails must not end the run
        except Exception as error:
            found[name] = {"skipped": f"failed: {type(error).__name__}: {first_line(error)}"}
        else:
            worst = max(errors, key=lambda output: errors[output])
            if not errors[worst] <= TOLERANCE[case.dtype]:
                found[name] = {
                    "skipped": f"wrong: {worst} is off by {errors[worst]:.2g} of the largest value"
                }
            else:
                built[name], found[name] = made, {"error": errors[worst]}
    return built, found


def _copy(case: Case) -> Program:
    """Copies as many bytes as x has, by reading and writing them once."""
    source = jnp.arange(case.nbytes // 4, dtype=jnp.uint32)
    copy = jax.jit(lambda bits: bits + jnp.uint32(1))
    return Program(lambda: copy(source), jax.block_until_ready, jax.default_backend() != "cpu")
