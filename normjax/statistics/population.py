"""Calibration statistics, which layers accumulate over batches for `recalibrate`.

`normjax.recalibrate` adds a leaf named `population` to a layer's `batch_stats`. The layer then adds
the moments of each batch to this leaf, and does not change its running mean and variance. Since the
leaf is an ordinary variable, it works under every transformation of JAX and Flax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Inexact

from normjax._typing import BatchStats, RunningVar, promote
from normjax.statistics.elements import abs2
from normjax.statistics.spec import Moments, or_one

POPULATION = "population"
Estimate = Literal["merged", "averaged"]


class Sums(NamedTuple):
    """Sums of weighted means and variances, and of the weights; each `(*features)`."""

    mean_weight: Array
    mean: Array
    var_weight: Array
    var: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["shift", "sums", "lost"],
    meta_fields=["estimate", "layer_by_layer"],
)
@dataclass(frozen=True)
class Population:
    """The calibration statistics of all batches so far, in constant memory.

    Attributes:
      shift: the mean of the first batch, which is subtracted from all means, `(*features)`.
      sums: the sums, rounded.
      lost: the rounding errors of the sums.
      estimate: "merged" for the moments of all elements; "averaged" for the mean of the batches'
        means and unbiased variances.
      layer_by_layer: whether the layer normalizes by its running statistics while it collects,
        instead of by batch statistics.
    """

    shift: Inexact[Array, "*features"]
    sums: Sums
    lost: Sums
    estimate: Estimate
    layer_by_layer: bool

    def add(self, moments: Moments, *, unbiased: bool) -> Population:
        """Adds a batch; `unbiased` selects the final variance of the "merged" estimate."""
        dtype, real = self._dtypes(moments)
        n, mean, var = moments.count, moments.mean.astype(dtype), moments.var.astype(real)
        n = jnp.broadcast_to(jnp.asarray(n).astype(real), var.shape)
        first = (n > 0) & (self.sums.mean_weight == 0)
        shift = jnp.where(first, mean, self.shift.astype(dtype))
        apart = jnp.where(n > 0, mean - shift, 0)
        if self.estimate == "merged":
            freedom = n - (first if unbiased else jnp.zeros_like(first)).astype(real)
            amounts = Sums(n, n.astype(dtype) * apart, freedom, n * (var + abs2(apart)))
        else:
            several = n > 1
            unbiased_var = jnp.where(several, var * (n / jnp.maximum(n - 1, 1)), 0)
            amounts = Sums((n > 0).astype(real), apart, several.astype(real), unbiased_var)
        before = self.sums._replace(mean=self.sums.mean.astype(dtype))
        sums = Sums(*map(jnp.add, before, amounts))
        lost = Sums(*map(_lost, before, amounts, sums, self.lost))
        return replace(self, shift=shift, sums=sums, lost=lost)

    def collected(
        self,
        batch_stats: BatchStats,
        batch: Moments,
        momentum: float | ArrayLike | None,
        running_var: RunningVar,
    ) -> BatchStats:
        """Returns the statistics with the batch added to this leaf, and to a cumulative count."""
        new: dict[str, Any] = {POPULATION: self.add(batch, unbiased=running_var == "unbiased")}
        if momentum is None:
            so_far = jnp.where(jnp.any(self.seen[0]), batch_stats["count"], 0)
            new["count"] = so_far + jnp.any(jnp.asarray(batch.count) > 0).astype(so_far.dtype)
        return batch_stats | new

    def statistics(self) -> tuple[Array, Array]:
        """Returns the mean and variance, which are arbitrary for features without elements."""
        weight, mean, freedom, var = map(jnp.add, self.sums, self.lost)
        offset = mean / or_one(weight).astype(mean.dtype)
        if self.estimate == "merged":
            var = jnp.maximum(var - weight * abs2(offset), 0)
        return self.shift + offset, var / or_one(freedom)

    @property
    def seen(self) -> tuple[Bool[Array, "*features"], Bool[Array, "*features"]]:
        """Returns which features have a mean, and which have a variance."""
        return self.sums.mean_weight > 0, self.sums.var_weight > 0

    def _dtypes(self, moments: Moments) -> tuple[Any, Any]:
        """Returns the dtypes of the sums, which are complex if x is."""
        dtype = self.shift.dtype
        if jnp.iscomplexobj(moments.mean):
            dtype = promote(dtype, jnp.complex64)
        return dtype, jnp.finfo(dtype).dtype


def empty_population(
    batch_stats: Mapping[str, Array], estimate: Estimate, layer_by_layer: bool
) -> Population:
    """Returns empty calibration statistics in at least float32, sharded like `batch_stats`."""
    mean = jnp.zeros_like(
        batch_stats["mean"], promote(jnp.asarray(batch_stats["mean"]).dtype, jnp.float32)
    )
    var = jnp.zeros_like(batch_stats["var"], jnp.finfo(mean.dtype).dtype)
    sums = Sums(var, mean, var, var)
    return Population(mean, sums, sums, estimate, layer_by_layer)


def is_replaced(batch_stats: Mapping[str, Any]) -> bool:
    """Returns whether a layer's running statistics are being recalibrated."""
    return isinstance(batch_stats.get(POPULATION), Population)


def is_layer_by_layer(batch_stats: Mapping[str, Any]) -> bool:
    """Returns whether a layer normalizes by its running statistics while it collects."""
    return POPULATION in batch_stats and batch_stats[POPULATION].layer_by_layer


def _lost(before: Array, amount: Array, after: Array, lost: Array) -> Array:
    """Adds the rounding error of `before + amount = after` (Knuth's TwoSum)."""
    added = after - before
    return lost + ((before - (after - added)) + (amount - added))
