"""The flags of the command line; options.py has the defaults of each data set."""

from __future__ import annotations

from pathlib import Path

from common.arguments import Parser, number

NETWORKS = ("resnet8", "resnet18", "resnet50")


def add(parser: Parser) -> None:
    """Adds all flags."""
    for group in (_add_network, _add_training, _add_output, _add_devices):
        group(parser)


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
        help="height and width (default: 32 for synthetic images, 224 for images in folders)",
    )
    add(
        "--classes",
        type=count,
        default=10,
        metavar="N",
        help="number of classes of synthetic images (default: %(default)s)",
    )
    add(
        "--train-examples",
        type=count,
        metavar="N",
        help="use only the first N training images; how many synthetic images (default: 2,048)",
    )
    add(
        "--test-examples",
        type=count,
        metavar="N",
        help="use only the first N test images; how many synthetic images (default: 512)",
    )


def _add_training(parser: Parser) -> None:
    count, add = number(int, "a positive integer"), parser.add_argument
    rate, positive = number(float, "a positive number"), "a number of at least 0"
    add(
        "--batch-size",
        type=count,
        default=128,
        metavar="N",
        help="examples per step on all devices together (default: %(default)s)",
    )
    add("--epochs", type=rate, metavar="N", help="(default: 30; 90 for images in folders)")
    add("--steps", type=count, metavar="N", help="number of steps, instead of --epochs")
    add(
        "--learning-rate",
        type=rate,
        metavar="RATE",
        help="learning rate after warm-up (default: 0.1 * batch size / 256)",
    )
    add(
        "--warmup",
        type=_from_zero(positive),
        default=0.05,
        metavar="PART",
        help="warm-up as a fraction of all steps (default: %(default)s)",
    )
    add(
        "--weight-decay",
        type=_from_zero(positive),
        default=5e-4,
        metavar="RATE",
        help="weight decay of kernels; other parameters do not decay (default: %(default)s)",
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
        help="number of examples that share statistics (default: the whole batch)",
    )
    add(
        "--momentum",
        type=rate,
        default=0.9,
        metavar="WEIGHT",
        help="momentum of running statistics (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype of activations (default: %(default)s)",
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
    add(
        "--keep",
        type=count,
        default=3,
        metavar="N",
        help="number of checkpoints to keep (default: %(default)s)",
    )
    add(
        "--allow-nan",
        action="store_true",
        help="continue if losses or statistics are not finite; the last finite checkpoint is kept",
    )
    add(
        "--allow-other-data",
        action="store_true",
        help="continue even if the data have changed since the checkpoint",
    )


def _add_devices(parser: Parser) -> None:
    count, add = number(int, "a positive integer"), parser.add_argument
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="number of processes that load data; 0 uses threads (default)",
    )
    add("--devices", type=count, metavar="N", help="simulate N CPU devices in each process")
    add(
        "--processes",
        type=count,
        metavar="N",
        help="start N processes on this machine, to test a cluster run",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens; TPU pods and Slurm jobs do not need these 3 flags",
    )
    add("--process-count", type=count, metavar="N", help="number of processes")
    add("--process-index", type=int, metavar="I", help="index of this process, from 0")
    add(
        "--no-distributed",
        dest="distributed",
        action="store_false",
        help="do not detect a cluster",
    )
    add(
        "--heartbeat",
        type=number(int, "an integer of at least 10", 10),
        default=30,
        metavar="SECONDS",
        help="time without a sign of life after which a process counts as gone; at most 30 on CPUs "
        "(default: %(default)s)",
    )
    add(
        "--stall",
        type=count,
        default=600,
        metavar="SECONDS",
        help="time without progress after which the run ends; 10 times as long while compiling "
        "(default: %(default)s)",
    )


def _from_zero(expected: str):
    def convert(text: str) -> float:
        return 0.0 if text.strip() in {"0", "0.0"} else number(float, expected)(text)

    convert.__name__ = "number"
    return convert
