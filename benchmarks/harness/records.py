"""Results as JSON, with machine and versions, and as tables."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "dm-haiku",
    "equinox",
    "keras",
    "torch",
    "tokamax",
    "numpy",
)


def header() -> dict[str, Any]:
    """Returns the command, the machine and the versions."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2),
            "backend": device.platform,
            "device": device.device_kind,
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
    }


def write(results: dict[str, Any], path: pathlib.Path) -> None:
    """Writes results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(
        f"{results['rows'][-1]['name'] if results['rows'] else 'no rows'}: written to {path}",
        flush=True,
    )


def read(path: pathlib.Path | str) -> dict[str, Any]:
    """Reads results that `write` has written."""
    return json.loads(pathlib.Path(path).read_text())


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Returns a Markdown table with text in the first column and figures in the others."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def peer_table(
    rows: list[dict[str, Any]], cell: Callable[[dict[str, Any], dict[str, Any]], str]
) -> str:
    """Returns a table with a column for each peer; `cell` returns the text of a cell."""
    names = list(
        dict.fromkeys(
            name for row in rows for name, got in row["peers"].items() if "skipped" not in got
        )
    )
    empty: dict[str, Any] = {"skipped": ""}

    def text(row: dict[str, Any], name: str) -> str:
        got = row["peers"].get(name, empty)
        return "-" if "skipped" in got else cell(row, got)

    extra = ["floor ms"] if any("floor_ms" in row for row in rows) else []
    body = (
        [row["name"], *(f"{row['floor_ms']:.3g}" for _ in extra), *(text(row, n) for n in names)]
        for row in rows
    )
    return table(["", *extra, *names], body)


def skipped(rows: list[dict[str, Any]]) -> str:
    """Lists the peers that were skipped, with a line for each peer and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, got in row["peers"].items():
            if "skipped" in got:
                found.setdefault((name, got["skipped"]), []).append(row["name"])
    return "\n".join(
        f"skipped: {name}, {'every row' if len(where) == len(rows) else _few(where)}: {reason}"
        for (name, reason), where in found.items()
    )


def first_line(error: Exception) -> str:
    """Returns the first line of an error that caused a peer to be skipped."""
    return (str(error).splitlines() or [""])[0][:160]


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} rows such as {names[0]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
