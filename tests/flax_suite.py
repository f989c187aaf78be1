#!/usr/bin/env python3
"""Runs Flax's own tests of its normalization layers with normjax's in their place.

    make test-flax FLAX=path/to/flax      # a checkout of Flax, at the version that is installed

Every name in Flax that means one of its layers (`nn.BatchNorm`, `LayerNorm` in nnx's attention) is
set to normjax's before a test file is imported. Then the tests run that name a layer, or something
in their file that does, as Flax configures them. Counted are those that made a layer of normjax.
The exit status is 0 if nothing fails but the tests in KNOWN.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import pathlib
import re
import sys
import unittest
from collections.abc import Iterable, Iterator
from typing import Any

import flax
import pytest
from flax import linen, nnx

import normjax as nj

LAYERS = (
    "BatchNorm",
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "InstanceNorm",
    "SpectralNorm",
    "WeightNorm",
)
# Tests that fail with normjax's layers, and why that is right.
KNOWN = {
    "linen_test.py::NormalizationTest::test_instance_norm3": "at x near 1e4 it compares with a "
    "formula in float32, which is farther from float64 than normjax is"
}
NO_CHECKOUT = f"""\
make test-flax runs the tests of Flax, which its package does not contain. Give it a checkout:

    git clone --depth 1 --branch v{flax.__version__} https://github.com/google/flax
    make test-flax FLAX=flax"""


def swap() -> dict[Any, Any]:
    """Puts normjax's layers in place of Flax's, wherever Flax has them; returns which is which."""
    chosen: dict[Any, Any] = {}
    for of_flax, own in ((linen, nj.linen), (nnx, nj.nnx)):
        chosen |= {getattr(of_flax, name): getattr(own, name) for name in LAYERS}
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "flax"]
    for module in modules:
        for name in LAYERS:
            replacement = chosen.get(vars(module).get(name))
            if replacement is not None:
                setattr(module, name, replacement)
    return chosen


class Watch:
    """A pytest plugin: which tests made a layer of normjax, and which of them did not pass."""

    def __init__(self, layers: list[type]):
        self.made = 0
        self.using: set[str] = set()
        self.failed: set[str] = set()
        self.skipped: set[str] = set()
        for layer in layers:
            self._count(layer)

    def _count(self, layer: Any) -> None:
        init = layer.__init__

        @functools.wraps(init)
        def counted(*args: Any, **kwargs: Any) -> None:
            self.made += 1
            init(*args, **kwargs)

        layer.__init__ = counted

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Notes a test that made a layer."""
        before = self.made
        result = yield
        if self.made > before:
            self.using.add(item.nodeid)
        return result

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leaves the tests that name a layer, or something in their file that does."""
        items[:] = [item for item in items if names_a_layer(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a test that failed or was skipped."""
        if not report.passed:
            (self.failed if report.failed else self.skipped).add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a file that cannot be imported."""
        if report.failed:
            self.failed.add(report.nodeid)

    @property
    def not_passed(self) -> list[str]:
        """The tests that failed, and those with a layer that were skipped."""
        return sorted(self.failed | (self.skipped & self.using))


def files(checkout: pathlib.Path) -> list[pathlib.Path]:
    """Returns Flax's test files that name a layer."""
    tests = sorted((checkout / "tests").rglob("*_test.py"))
    return [test for test in tests if named(LAYERS, test.read_text())]


def names_a_layer(item: Any) -> bool:
    """Returns whether a test names a layer, or a function or class of its file that does."""
    source = inspect.getsource(item.function)
    return named((*LAYERS, *helpers(item.module)), source)


@functools.cache
def helpers(module: Any) -> list[str]:
    """Returns the functions and classes of a test file that name a layer, but for its tests."""
    own = {name: value for name, value in vars(module).items() if _is_helper(value, module)}
    return [name for name, value in own.items() if named(LAYERS, inspect.getsource(value))]


def _is_helper(value: Any, module: Any) -> bool:
    own = inspect.isroutine(value) or inspect.isclass(value)
    is_test = inspect.isclass(value) and issubclass(value, unittest.TestCase)
    return own and not is_test and value.__module__ == module.__name__


def named(names: Iterable[str], source: str) -> bool:
    """Returns whether a source has one of the names."""
    return re.search("|".join(rf"\b{name}\b" for name in names), source) is not None


def sentence(watch: Watch) -> str:
    """Says how many of Flax's tests pass, and why the others do not."""
    using, passed = len(watch.using), len(watch.using.difference(watch.not_passed))
    lines = [
        f"Of the {using} tests of Flax {flax.__version__} that use its normalization layers, "
        f"{passed} pass with normjax's."
    ]
    for test in watch.not_passed:
        lines.append(f"{test.split('/')[-1]} does not: {reason(test) or 'see above'}.")
    return "\n".join(lines)


def reason(test: str) -> str | None:
    """Returns why a test is known to fail."""
    return next((why for name, why in KNOWN.items() if test.endswith(name)), None)


def main() -> int:
    """Swaps, runs, prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=pathlib.Path)
    checkout = parser.parse_args().checkout
    if checkout is None or not (checkout / "tests" / "linen").is_dir():
        print(NO_CHECKOUT if checkout is None else f"There is no checkout of Flax in {checkout}")
        return 2
    # Flax turns warnings into errors, and pytest warns of plugins that normjax has imported.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    watch = Watch([*swap().values()])
    settings = ["-c", str(checkout / "pyproject.toml"), "--rootdir", str(checkout)]
    settings += ["-q", "-p", "no:cacheprovider", "--tb=short"]
    pytest.main([*settings, *map(str, files(checkout))], plugins=[watch])
    print(sentence(watch))
    return int(not watch.using or any(reason(test) is None for test in watch.not_passed))


if __name__ == "__main__":
    sys.exit(main())
