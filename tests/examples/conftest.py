"""Finds the examples, and compiles their programs without optimizing them."""

import sys
from pathlib import Path

import jax
import pytest

# `python examples/speedup.py` has the script's own folder on the path, and so do these tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="module", autouse=True)
def without_optimizations():
    """Programs here run a few steps only, and LLVM would take longer to optimize them than they run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
