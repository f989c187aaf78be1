"""Subtract the mean of each example, divide by its deviation: what layer, group and instance norm have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from normjax._typing import Params
from normjax.layers._affine import normalize
from normjax.layers._arguments import compiled_within_examples
from normjax.statistics.per_example import example_moments
from normjax.statistics.reduction import Reduction, widen


class Plan(NamedTuple):
    """What is static about a step; hashable, so that eager calls compile it once.

    Attributes:
      how: the reduction.
      dtype: of y.
      gain: a constant factor of the scale.
    """

    how: Reduction
    dtype: Any
    gain: float = 1.0


@compiled_within_examples
def standardize(params: Params, x: Array, mask: Array | None, plan: Plan) -> Array:
    """Normalizes x by its own moments; params and mask have its rank."""
    wide = widen(x)
    count, mean, var = example_moments(plan.how, x, wide, mask)
    if mask is not None:
        var = jnp.where(jnp.asarray(count) > 0, var, 1)
    mean, var = plan.how.expand(mean), plan.how.expand(var)
    if plan.gain != 1:
        params = params | {"scale": params.get("scale", jnp.ones((), var.dtype)) * plan.gain}
    return normalize(x, wide, mean, var, params, mask=mask, epsilon=plan.how.epsilon).astype(
        plan.dtype
    )
