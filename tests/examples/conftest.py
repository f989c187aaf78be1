"""Finds the examples, and compiles their programs without optimizing them."""

import sys
from pathlib import Path

import pytest

# `python examples/speedup.py` has the script's own folder on the path, and so do these tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="module", autouse=True)
def few_steps(without_optimizations):
    """Programs here run a few steps only: LLVM would take longer to optimize them than they run."""
