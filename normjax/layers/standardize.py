"""Standardizes each example for layer, group and instance norm."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from normjax._typing import Params
from normjax.layers.affine import normalize
from normjax.layers.jit_step import jit_step_within_examples
from normjax.statistics.per_example import ExampleSpec, example_moments
from normjax.statistics.reduction import read


@dataclass(frozen=True)
class StandardizeSpec(ExampleSpec):
    """The static arguments of a step.

    Attributes:
      gain: a constant factor of the scale.
    """

    gain: float = 1.0


@jit_step_within_examples
def standardize(params: Params, x: Array, mask: Array | None, spec: StandardizeSpec) -> Array:
    """Normalizes x by its own moments. If nothing counts, the mean is 0 and the variance 1."""
    inputs = read(x, mask)
    count, mean, var = example_moments(spec, inputs, mask)
    if mask is not None:
        var = jnp.where(jnp.asarray(count) > 0, var, spec.unit(x) ** 2)
    if spec.gain != 1:
        scale = params["scale"] if "scale" in params else jnp.ones((), var.dtype)
        params = params | {"scale": scale * spec.gain}
    y = normalize(inputs, spec.expand(mean), spec.expand(var), params, spec.epsilon, spec.unit(x))
    return y.astype(spec.dtype)
