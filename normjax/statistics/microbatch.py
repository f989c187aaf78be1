"""The moments of a microbatch in a layer, and how the layer updates its running statistics.

`optim.accumulate` adds a leaf to a layer's `batch_stats`. The layer then stores this information in
the leaf, and does not change its running mean and variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from normjax._typing import BatchStats, RunningVar, promote
from normjax.statistics.merge import merge_moments
from normjax.statistics.population import POPULATION
from normjax.statistics.running import next_count, whole
from normjax.statistics.spec import Moments

UNTOLD = -1.0


class Rule(NamedTuple):
    """How a layer updates its running statistics; each `(*features)`.

    Attributes:
      momentum: the weight of the old value; UNTOLD until the layer has stored it.
      rate: the weight of the batch, 1 - momentum, stored separately to avoid a rounding error.
      freedom: 1 if the layer stores unbiased variances, else 0; subtracted from the count.
    """

    momentum: Float[Array, "*features"]
    rate: Float[Array, "*features"]
    freedom: Float[Array, "*features"]


class Microbatch(NamedTuple):
    """The moments of a microbatch, and the rule of the layer that measured them."""

    moments: Moments
    rule: Rule

    @property
    def layer_by_layer(self) -> bool:
        """Returns False: the layer normalizes by batch statistics, as in training."""
        return False

    def collected(
        self,
        batch_stats: BatchStats,
        batch: Moments,
        momentum: float | ArrayLike | None,
        running_var: RunningVar,
    ) -> BatchStats:
        """Returns the statistics with one more call of the layer added to this leaf."""
        rule = rule_of(batch_stats, momentum, running_var)
        told: Any = self.merged(like(self, Microbatch(batch, rule)))
        return batch_stats | {POPULATION: told}

    def merged(self, other: Self) -> Microbatch:
        """Returns the moments of both, and the rule that was stored last."""
        rule = select(other.rule.momentum != UNTOLD, other.rule, self.rule)
        return Microbatch(merge_moments(self.moments, other.moments), rule)

    def applied(self, batch_stats: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the running statistics after one update by the layer's own rule."""
        rule = self.rule
        count, mean, var = map(jnp.asarray, self.moments)
        enough, enough_for_var = count > 0, count > rule.freedom
        freed = var * (count / jnp.maximum(count - rule.freedom, 1))
        var = jnp.where(rule.freedom > 0, freed, var)
        new = dict(batch_stats)
        new["mean"] = _moved(batch_stats["mean"], mean, rule, enough)
        new["var"] = _moved(batch_stats["var"], var, rule, enough_for_var)
        if "count" in new:
            new["count"] = next_count(new["count"], enough)
        return new


def rule_of(
    batch_stats: Mapping[str, Array],
    momentum: float | ArrayLike | None,
    running_var: RunningVar,
) -> Any:
    """Returns the rule of a layer with these arguments, as scalars."""
    if momentum is None:
        real = promote(jnp.result_type(batch_stats["var"]), jnp.float32)
        momentum = 1 - 1 / (whole(batch_stats["count"]) + 1).astype(real)
    elif not isinstance(momentum, float | int):
        momentum = jnp.asarray(momentum)
    return Rule(momentum, 1 - momentum, float(running_var == "unbiased"))  # pyright: ignore


def _moved(old: Array, batch: Array, rule: Rule, enough: Array) -> Array:
    """Returns the weighted mean, rounded as in `running.update`; a weight of 0 has no effect."""
    keep, rate = rule.momentum.astype(batch.dtype), rule.rate.astype(batch.dtype)
    kept = jnp.where(keep == 0, 0, keep * old.astype(batch.dtype))
    new = kept + jnp.where(rate == 0, 0, rate * batch)
    return jnp.where(enough, new.astype(old.dtype), old)


def no_microbatch(layer: Mapping[str, Array]) -> Microbatch:
    """Returns the initial leaf of a layer with these statistics."""
    mean, var = jnp.asarray(layer["mean"]), jnp.asarray(layer["var"])
    mean = jnp.zeros_like(mean, promote(mean.dtype, jnp.float32))
    var = jnp.zeros_like(var, promote(var.dtype, jnp.float32))
    # NumPy arrays have known values under jit, so an error can name a layer that stored nothing.
    untold: Any = np.full(var.shape, UNTOLD, var.dtype)
    rule = Rule(untold, untold.copy(), np.zeros_like(untold))
    return Microbatch(Moments(jnp.zeros_like(var), mean, var), rule)


def like(template: Any, given: Any) -> Any:
    """Returns numbers and arrays with the shapes and dtypes of a template."""

    def one(wanted: Array, part: ArrayLike) -> Array:
        is_complex = jnp.iscomplexobj(part) and not jnp.iscomplexobj(wanted)
        dtype = promote(wanted.dtype, jnp.complex64) if is_complex else wanted.dtype
        return jnp.broadcast_to(jnp.asarray(part), wanted.shape).astype(dtype)

    return jax.tree.map(one, template, given)


def select(condition: Array, yes: Any, no: Any) -> Any:
    """Returns one of two trees, in the dtypes of the second."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(b.dtype), yes, no)
