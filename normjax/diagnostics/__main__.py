"""Reports on the normalization layers of a checkpoint: Orbax, Flax's msgpack or safetensors.

    python -m normjax.diagnostics CHECKPOINT [--json [FILE]] [--html FILE]

Exit status: 0 if no finding is an error, 1 if one is, 2 if the checkpoint cannot be read, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normjax.diagnostics.report import Report

PROGRAM = "normjax.diagnostics"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit status."""
    options = _parse(arguments)
    try:
        status = _run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.checkpoint is None and options.json not in (None, "-"):  # `--json CHECKPOINT`
        options.checkpoint, options.json = Path(options.json), "-"
    if options.checkpoint is None:
        parser.error("CHECKPOINT is missing")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        usage="%(prog)s [-h] CHECKPOINT [--json [FILE]] [--html FILE] [--epsilon E]",
        description="Reports on the normalization layers of a checkpoint: what is wrong with them, "
        "and what to do about it.",
        epilog="Exit status: 0 if no finding is an error, 1 if one is, 2 if the checkpoint cannot "
        "be read.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        nargs="?",
        help="a folder that Orbax wrote (the newest step is read), or a file in Flax's msgpack or "
        "safetensors",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE, or to standard output without one",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with pictures of every layer"
    )
    parser.add_argument(
        "--epsilon",
        type=float,
        default=1e-5,
        metavar="E",
        help="the epsilon of the layers (default: %(default)s)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    from normjax.diagnostics.report import report
    from normjax.diagnostics.report.checkpoints import UnreadableError, read_checkpoint

    try:
        found = report(read_checkpoint(options.checkpoint), epsilon=options.epsilon)
    except (UnreadableError, ValueError, TypeError) as error:
        return _fail(options.checkpoint, str(error).removeprefix("report: "))
    try:
        _write(found, options)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(error.filename, error.strerror)
    return 1 if found.count("error") else 0


def _write(found: Report, options: argparse.Namespace) -> None:
    if options.html is not None:
        from normjax.diagnostics.report.page import page

        options.html.write_text(page(found, options.checkpoint.absolute().name), encoding="utf-8")
    if options.json == "-":
        print(found.to_json())
        return
    if options.json is not None:
        Path(options.json).write_text(found.to_json() + "\n", encoding="utf-8")
    _print(found)


def _print(found: Report) -> None:
    """Prints in color on a terminal if rich is installed, else as text with unbroken lines."""
    try:
        from rich.console import Console
    except ImportError:
        print(found)
        return
    console = Console()
    console.print(found) if console.is_terminal else print(found)


def _fail(path: object, problem: object) -> int:
    print(f"{PROGRAM}: {path}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # A KeyboardInterrupt may get lost in a callback from C, so Ctrl-C ends the process at once.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.exit(main())
