"""The command line: flags, defaults for each data set, and the checks that need no devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.arguments import Parser, number

NETWORKS = ("resnet8", "resnet18", "resnet50")
# Of a process or a machine, not of the run: they may differ between processes, and from a run to
# its continuation.
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
CHANGEABLE = ("out", "checkpoint_every", "keep", "eval_every", "log_every", "heartbeat")


@dataclass(frozen=True)
class Options:
    """What to run; the flags of the same names say what each means."""

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

    def shared(self) -> dict[str, Any]:
        """Returns what has to be the same in all processes, as JSON has it."""
        return {name: _plain(value) for name, value in asdict(self).items() if name not in LOCAL}

    def course(self) -> dict[str, Any]:
        """Returns the options that affect training, which must not change when a run continues."""
        return {name: value for name, value in self.shared().items() if name not in CHANGEABLE}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def parse(arguments: Sequence[str], description: str | None) -> Options:
    """Returns the options of the command line, or exits with a line that says what is wrong."""
    parser = Parser(description)
    parser.prog = "train_resnet"
    for add in (_add_network, _add_training, _add_output, _add_devices):
        add(parser)
    given = vars(parser.parse_args(arguments))
    if given["data"] != "synthetic" and given["data_dir"] is None:
        parser.error(f"--data {given['data']} needs --data-dir, the folder that holds it")
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


def _add_network(parser: Parser) -> None:
    count, add = number(int, "a positive integer"), parser.add_argument
    add("--network", choices=NETWORKS, default="resnet18", help="(default: %(default)s)")
    add(
        "--width",
        type=count,
        default=64,
        metavar="N",
        help="channels of the first stage (default: %(default)s)",
    )
    add(
        "--data",
        choices=("synthetic", "cifar10", "folder"),
        default="synthetic",
        help="(default: %(default)s)",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="CIFAR-10's binary files; or train/CLASS/* and val/CLASS/*",
    )
    add(
        "--image-size",
        type=count,
        metavar="N",
        help="of synthetic images (32) and of images in folders (224)",
    )
    add(
        "--classes",
        type=count,
        default=10,
        metavar="N",
        help="of synthetic images (default: %(default)s)",
    )
    add(
        "--train-examples",
        type=count,
        metavar="N",
        help="use only the first N; synthetic: how many (2,048)",
    )
    add(
        "--test-examples",
        type=count,
        metavar="N",
        help="use only the first N; synthetic: how many (512)",
    )


def _add_training(parser: Parser) -> None:
    count, add = number(int, "a positive integer"), parser.add_argument
    rate, positive = number(float, "a positive number"), "a number of at least 0"
    add(
        "--batch-size",
        type=count,
        default=128,
        metavar="N",
        help="of all devices together (default: %(default)s)",
    )
    add("--epochs", type=rate, metavar="N", help="(default: 30; 90 for images in folders)")
    add("--steps", type=count, metavar="N", help="instead of --epochs")
    add(
        "--learning-rate",
        type=rate,
        metavar="RATE",
        help="after warm-up (default: 0.1 for each 256 of the batch)",
    )
    add(
        "--warmup",
        type=_from_zero(positive),
        default=0.05,
        metavar="PART",
        help="of the steps (default: %(default)s)",
    )
    add(
        "--weight-decay",
        type=_from_zero(positive),
        default=5e-4,
        metavar="RATE",
        help="of kernels only (%(default)s)",
    )
    add(
        "--label-smoothing",
        type=_from_zero(positive),
        default=0.1,
        metavar="PART",
        help="(default: %(default)s)",
    )
    add(
        "--norm-group",
        type=count,
        metavar="N",
        help="examples that share statistics (default: the whole batch)",
    )
    add(
        "--momentum",
        type=rate,
        default=0.9,
        metavar="WEIGHT",
        help="of running statistics (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of activations (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def _add_output(parser: Parser) -> None:
    count, add = number(int, "a positive integer"), parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("results/train_resnet"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    add("--log-every", type=count, default=10, metavar="STEPS", help="(default: %(default)s)")
    add("--eval-every", type=count, default=200, metavar="STEPS", help="(default: %(default)s)")
    add(
        "--checkpoint-every",
        type=count,
        default=200,
        metavar="STEPS",
        help="(default: %(default)s)",
    )
    add("--keep", type=count, default=3, metavar="N", help="checkpoints (default: %(default)s)")


def _add_devices(parser: Parser) -> None:
    count, add = number(int, "a positive integer"), parser.add_argument
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that load data; 0: threads (default)",
    )
    add("--devices", type=count, metavar="N", help="simulate N CPU devices, in each process")
    add(
        "--processes",
        type=count,
        metavar="N",
        help="start N processes on this machine, to try it out",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens; a pod or Slurm job needs none of these 3",
    )
    add("--process-count", type=count, metavar="N", help="of all processes")
    add("--process-index", type=int, metavar="I", help="of this process, from 0")
    add(
        "--no-distributed",
        dest="distributed",
        action="store_false",
        help="do not ask whether there is a cluster",
    )
    add(
        "--heartbeat",
        type=number(int, "an integer of at least 10", 10),
        default=30,
        metavar="SECONDS",
        help="without a sign of life, until a process is given up (default: %(default)s)",
    )


def _from_zero(expected: str):
    def convert(text: str) -> float:
        return 0.0 if text.strip() in {"0", "0.0"} else number(float, expected)(text)

    convert.__name__ = "number"
    return convert


def total_steps(options: Options, examples: int) -> int:
    """Returns the number of steps of the whole run."""
    return options.steps or max(1, math.ceil(options.epochs * examples / options.batch_size))
