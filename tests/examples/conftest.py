"""Finds the examples, and has the fixtures that start the training program."""

import sys
from pathlib import Path

# `python examples/speedup.py` has the script's own folder on the path, and so do these tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from train_runs import environment, run, start, started_apart  # noqa: E402, F401
