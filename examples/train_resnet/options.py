"""The command line: defaults for each data set, and checks that do not need devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.arguments import Parser

from train_resnet import flags

# Options of a process or machine, not of the run: they may differ between processes, and may change
# when a run is continued.
LOCAL = (
    "data_dir",
    "devices",
    "workers",
    "processes",
    "coordinator",
    "process_count",
    "process_index",
    "distributed",
)
# May be changed when a run is continued.
CHANGEABLE = (
    "out",
    "checkpoint_every",
    "keep",
    "eval_every",
    "log_every",
    "heartbeat",
    "stall",
    "allow_nan",
    "allow_other_data",
)


@dataclass(frozen=True)
class Options:
    """The options of a run; see the help of the flags with the same names."""

    network: str
    width: int
    data: str
    data_dir: Path | None
    image_size: int
    classes: int
    train_examples: int | None
    test_examples: int | None
    batch_size: int
    epochs: float
    steps: int | None
    learning_rate: float
    warmup: float
    weight_decay: float
    label_smoothing: float
    norm_group: int
    momentum: float
    dtype: str
    seed: int
    out: Path
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int
    workers: int
    devices: int | None
    processes: int | None
    coordinator: str | None
    process_count: int | None
    process_index: int | None
    distributed: bool
    heartbeat: int
    stall: int
    allow_nan: bool
    allow_other_data: bool

    def shared(self) -> dict[str, Any]:
        """Returns the options that must be the same in all processes, as JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items() if name not in LOCAL}

    def course(self) -> dict[str, Any]:
        """Returns the options that affect training, which must not change when a run continues."""
        return {name: value for name, value in self.shared().items() if name not in CHANGEABLE}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def parse(arguments: Sequence[str], description: str | None) -> Options:
    """Returns the options of the command line, or exits with a line about the problem."""
    parser = Parser(description)
    parser.prog = "train_resnet"
    flags.add(parser)
    given = vars(parser.parse_args(arguments))
    if given["data"] != "synthetic" and given["data_dir"] is None:
        parser.error(f"--data {given['data']} needs --data-dir, the folder that holds it")
    if given["data"] == "synthetic" and given["data_dir"] is not None:
        parser.error(
            f"--data-dir {given['data_dir']} is for --data cifar10 or folder: "
            "synthetic images are not read from files"
        )
    apart = [given[name] is None for name in ("coordinator", "process_count", "process_index")]
    if any(apart) and not all(apart):
        parser.error("--coordinator, --process-count and --process-index go together")
    if not any(apart) and not 0 <= given["process_index"] < given["process_count"]:
        parser.error(
            f"--process-index {given['process_index']} is not one of 0 to "
            f"{given['process_count'] - 1}"
        )
    if given["image_size"] is None:
        given["image_size"] = 224 if given["data"] == "folder" else 32
    if given["learning_rate"] is None:
        given["learning_rate"] = 0.1 * given["batch_size"] / 256  # Goyal et al. 2017
    if given["norm_group"] is None:
        given["norm_group"] = given["batch_size"]
    given["epochs"] = given["epochs"] or (90 if given["data"] == "folder" else 30)
    given["out"] = given["out"].absolute()
    return Options(**given)


def total_steps(options: Options, examples: int) -> int:
    """Returns the number of steps of the whole run."""
    return options.steps or max(1, math.ceil(options.epochs * examples / options.batch_size))
