"""The flags of the command line; options.py has the defaults of each data set."""

from __future__ import annotations

from pathlib import Path

from common.arguments import COUNT, RATE, Parser, number

NETWORKS = ("resnet8", "resnet18", "resnet50")


def add(parser: Parser) -> None:
    """Adds all flags."""
    for group in (_add_network, _add_training, _add_output, _add_devices):
        group(parser)


def _add_network(parser: Parser) -> None:
    add = parser.add
    add("--network", None, "", choices=NETWORKS, default="resnet18")
    add("--width", COUNT, "channels of the first stage", default=64)
    add("--data", None, "", choices=("synthetic", "cifar10", "folder"), default="synthetic")
    add("--data-dir", Path, "CIFAR-10's binary files; or train/CLASS/* and val/CLASS/*")
    sizes = "(default: 32 for synthetic images, 224 for images in folders)"
    add("--image-size", COUNT, f"height and width {sizes}")
    add("--classes", COUNT, "number of classes of synthetic images", default=10)
    synthetic = "how many synthetic images"
    first = "use only the first N training images"
    add("--train-examples", COUNT, f"{first}; {synthetic} (default: 2,048)")
    first = "use only the first N test images"
    add("--test-examples", COUNT, f"{first}; {synthetic} (default: 512)")


def _add_training(parser: Parser) -> None:
    add, from_zero = parser.add, _from_zero("a number of at least 0")
    add("--batch-size", COUNT, "examples per step on all devices together", default=128)
    add("--epochs", RATE, "(default: 30; 90 for images in folders)", metavar="N")
    add("--steps", COUNT, "number of steps, instead of --epochs")
    rate = "learning rate after warm-up (default: 0.1 * batch size / 256)"
    add("--learning-rate", RATE, rate)
    part = "warm-up as a fraction of all steps"
    add("--warmup", from_zero, part, default=0.05, metavar="PART")
    decay = "weight decay of kernels; other parameters do not decay"
    add("--weight-decay", from_zero, decay, default=5e-4, metavar="RATE")
    add("--label-smoothing", from_zero, "", default=0.1, metavar="PART")
    group = "number of examples that share statistics (default: the whole batch)"
    add("--norm-group", COUNT, group)
    add("--momentum", RATE, "momentum of running statistics", default=0.9, metavar="WEIGHT")
    dtypes = ("bfloat16", "float32")
    add("--dtype", None, "dtype of activations", choices=dtypes, default="bfloat16")
    add("--seed", int, "", default=0, metavar="N")


def _add_output(parser: Parser) -> None:
    add = parser.add
    add("--out", Path, "", default=Path("results/train_resnet"))
    add("--log-every", COUNT, "", default=10, metavar="STEPS")
    add("--eval-every", COUNT, "", default=200, metavar="STEPS")
    add("--checkpoint-every", COUNT, "", default=200, metavar="STEPS")
    add("--keep", COUNT, "number of checkpoints to keep", default=3)
    parser.add_argument(
        "--allow-nan",
        action="store_true",
        help="continue if losses or statistics are not finite; the last finite checkpoint is kept",
    )
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="continue even if the data have changed since the checkpoint",
    )


def _add_devices(parser: Parser) -> None:
    add = parser.add
    workers = "number of processes that load data; 0 uses threads (default)"
    parser.add_argument("--workers", type=int, default=0, metavar="N", help=workers)
    add("--devices", COUNT, "simulate N CPU devices in each process")
    add("--processes", COUNT, "start N processes on this machine, to test a cluster run")
    coordinator = "where process 0 listens; TPU pods and Slurm jobs do not need these 3 flags"
    add("--coordinator", None, coordinator, metavar="HOST:PORT")
    add("--process-count", COUNT, "number of processes")
    add("--process-index", int, "index of this process, from 0", metavar="I")
    parser.add_argument(
        "--no-distributed",
        dest="distributed",
        action="store_false",
        help="do not detect a cluster",
    )
    heartbeat = (
        "time without a sign of life after which a process counts as gone; at most 30 on CPUs"
    )
    seconds = number(int, "an integer of at least 10", 10)
    add("--heartbeat", seconds, heartbeat, default=30, metavar="SECONDS")
    stall = "time without progress after which the run ends; 10 times as long while compiling"
    add("--stall", COUNT, stall, default=600, metavar="SECONDS")


def _from_zero(expected: str):
    def convert(text: str) -> float:
        return 0.0 if text.strip() in {"0", "0.0"} else number(float, expected)(text)

    convert.__name__ = "number"
    return convert
