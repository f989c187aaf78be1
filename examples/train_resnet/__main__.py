"""Trains a ResNet with synced batch normalization on a laptop, a GPU machine or a TPU pod.

    python examples/train_resnet                      # synthetic images, on all local devices
    python examples/train_resnet --data cifar10 --data-dir DIR
    python examples/train_resnet --devices 8          # 8 simulated CPU devices
    python examples/train_resnet --processes 2        # 2 processes here, over loopback

Run the same command on every host of a TPU pod or Slurm job to train on all of them. To continue a
run, run its command again.
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
    # Imported here, so that the launcher and errors of the command line do not wait for JAX.
    from train_resnet import runtime

    return runtime.guard(asked, stop)


if __name__ == "__main__":
    sys.exit(main())
