"""Finds the examples."""

import sys
from pathlib import Path

# `python examples/speedup.py` has the script's own folder on the path, and so do these tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
