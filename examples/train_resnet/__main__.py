"""Trains a ResNet with synced batch normalization on a laptop, a GPU machine or a TPU pod.

    python examples/train_resnet                      # synthetic images, whatever devices there are
    python examples/train_resnet --data cifar10 --data-dir DIR
    python examples/train_resnet --devices 8          # 8 simulated CPU devices
    python examples/train_resnet --processes 2        # 2 processes here, over loopback

The same command on every host of a TPU pod or of a Slurm job trains on all of them. To continue a
run, give its command again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from train_resnet import launch, options, signals
from train_resnet.ending import STATUSES


def main() -> int:
    """Returns the exit status."""
    asked = options.parse(sys.argv[1:], f"{__doc__}\n{STATUSES}")
    if asked.processes is not None:
        return launch.run(asked.processes, sys.argv)
    stop = signals.Stop()
    stop.listen()  # before NumPy and JAX start threads
    # Here, so that a launcher and a mistake on the command line need not wait for JAX.
    from train_resnet import runtime

    return runtime.guard(asked, stop)


if __name__ == "__main__":
    sys.exit(main())
