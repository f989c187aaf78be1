"""The cases of the contract, and the program that most of its tests run on different arguments."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.layers import LAYERS, SHAPE, arguments

EPS = float(jnp.finfo(jnp.float32).eps)
# Programs compiled differently may add in another order: tens of roundings of terms of order 10.
REORDERED = {"rtol": 100 * EPS, "atol": 100 * EPS}


class Case:
    """A layer with one of its settings. Each is one object, by which its programs are kept."""

    def __init__(self, layer, variant):
        self.layer, self.variant = layer, variant
        self.settings = layer.settings[variant]
        self.masked = "mask" in self.settings

    def __repr__(self):
        return f"{self.layer.name}-{self.variant}"

    def arguments(self, rng, dtype=jnp.float32):
        return arguments(self.layer, self.settings, rng, dtype)

    def mask(self):
        return np.array(np.broadcast_to(self.settings["mask"], SHAPE)) if self.masked else None

    def apply(self, train, **settings):
        return functools.partial(self.layer.apply, train=train, **(self.settings | settings))


CASES = [Case(layer, variant) for layer in LAYERS for variant in layer.settings]


def of(cases):
    """Runs a test for these cases; those that are not plain are left out of the fast suite."""
    parameters = [
        pytest.param(case, id=repr(case), marks=() if case.variant == "plain" else pytest.mark.slow)
        for case in cases
    ]
    return pytest.mark.parametrize("case", parameters)


every_case = of(CASES)


class Outcome(NamedTuple):
    """What a step gives: y, new statistics, y at inference, and gradients of params and x."""

    y: jax.Array
    new: dict[str, Any]
    inferred: jax.Array
    gradients: tuple[Any, jax.Array]


@functools.cache
def step(case):
    """One step of training and one of inference, as a function of all arrays.

    The gradients are those of the sum of tanh(y) over what counts.
    """

    def run(params, batch_stats, x, mask):
        settings = {} if mask is None else {"mask": mask}

        def loss(params, x):
            y, new = case.apply(True, **settings)(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y if mask is None else jnp.where(mask, y, 0))), (y, new)

        gradients, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        inferred, _ = case.apply(False, **settings)(params, batch_stats, x)
        return Outcome(y, new, inferred, gradients)

    return run


@functools.cache
def program(on_platform, case):
    """The step of a case, compiled once."""
    given = case.arguments(np.random.default_rng(0))
    return on_platform.compiled(step(case), *given, case.mask())
