"""Docstrings of `normjax.nnx` describe every argument, and nothing else."""

import pytest

from normjax import nnx
from tests.documented import arguments, documented


@pytest.mark.parametrize("name", nnx.__all__)
def test_the_arguments_of_the_constructor_are_described_in_its_order(name):
    module = getattr(nnx, name)
    assert documented(module) == arguments(module.__init__)


@pytest.mark.parametrize("name", nnx.__all__)
def test_the_arguments_of_the_call_are_described(name):
    call = getattr(nnx, name).__call__
    assert documented(call) == arguments(call)
