"""Docstrings of `normjax.linen` describe every field and argument, and nothing else."""

import dataclasses

import pytest

from normjax import linen
from tests.documented import arguments, documented

OF_EVERY_MODULE = ("parent", "name")


@pytest.mark.parametrize("name", linen.__all__)
def test_the_fields_are_described_in_the_order_of_the_constructor(name):
    module = getattr(linen, name)
    fields = [
        field.name for field in dataclasses.fields(module) if field.name not in OF_EVERY_MODULE
    ]
    assert documented(module) == fields


@pytest.mark.parametrize("name", linen.__all__)
def test_the_arguments_of_the_call_are_described(name):
    call = getattr(linen, name).__call__
    assert documented(call) == arguments(call)
