"""The modules of `normjax.linen` and `normjax.nnx`, each made and called in one way."""

from typing import Any, NamedTuple

import jax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj

KEY = jax.random.key(0)
WRAPPERS = ("SpectralNorm", "WeightNorm", "WeightStandardization")
RUNNING = ("BatchNorm", "BatchRenorm")
OPTIONS = {"GroupNorm": {"num_groups": 2}}


def normal(key, shape, dtype):
    """An initializer that can be pickled; the one that `nn.Dense` has cannot."""
    return jax.random.normal(key, shape, dtype)


class Adapter(NamedTuple):
    """A class of an adapter.

    Attributes:
      package: "linen" or "nnx".
      name: of the class.
    """

    package: str
    name: str

    def __repr__(self):
        return f"{self.package}.{self.name}"

    def make(self, features=4, **options):
        """Returns a module for x of so many features; wrappers hold a dense layer."""
        options = OPTIONS.get(self.name, {}) | options
        kind = getattr(getattr(nj, self.package), self.name)
        if self.package == "linen":
            if self.name in WRAPPERS:
                return kind(nn.Dense(features, kernel_init=normal), **options)
            running = {"use_running_average": False} if self.name in RUNNING else {}
            return kind(**running | options)
        if self.name in WRAPPERS:
            layer = nnx.Linear(features, features, rngs=nnx.Rngs(0))
            return kind(layer, **options, rngs=nnx.Rngs(1))
        return kind(features, **options, rngs=nnx.Rngs(0))

    def call(self, module, x, **settings) -> Any:
        """Returns y in training, from variables as initialized; nnx modules are changed."""
        if self.package == "nnx":
            return module(x, **settings)
        if self.name == "SpectralNorm":
            settings = {"update_stats": True} | settings
        y, _ = module.init_with_output(KEY, x, **settings)
        return y


ADAPTERS = [
    Adapter(package, name) for package in ("linen", "nnx") for name in getattr(nj, package).__all__
]
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
