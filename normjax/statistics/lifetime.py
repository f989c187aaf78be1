"""Statistics of all elements seen so far, with compensation of rounding errors."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from normjax._typing import BatchStats, DTypeLike, promote
from normjax.statistics.spec import Moments, or_one

LEAVES = ("mean", "var", "count")
RESTS = ("mean_rest", "var_rest", "count_rest")


def init_lifetime(
    features: tuple[int, ...], initial_count: ArrayLike, dtype: DTypeLike
) -> BatchStats:
    """Returns mean 0 and variance 1 of `initial_count` elements, in at least float32."""
    dtype = promote(dtype, jnp.float32)
    values = {
        "mean": jnp.zeros(features, dtype),
        "var": jnp.ones(features, dtype),
        "count": jnp.asarray(initial_count, dtype),
    }
    rests = {
        rest: jnp.zeros_like(value) for rest, value in zip(RESTS, values.values(), strict=True)
    }
    return values | rests


def add_batch(batch_stats: BatchStats, batch: Moments) -> BatchStats:
    r"""Returns the statistics of all earlier elements and the batch.

    This is `merge_moments` with compensated sums: the rounding error of each sum is stored and
    added to the next sum. In plain float32, the count would stop increasing at :math:`2^{24}`, and
    the mean would stop changing once a batch is less than 6e-8 of the whole.

    Args:
      batch_stats: `mean`, `var` and `count`, and their rounding errors `mean_rest` and so on.
      batch: moments of the batch, with one count for all features.
    """
    mean, var, seen = (batch_stats[leaf] for leaf in LEAVES)
    mean_rest, var_rest, seen_rest = (batch_stats[rest] for rest in RESTS)
    batch_mean, batch_var = batch.mean.astype(mean.dtype), batch.var.astype(var.dtype)
    count = jnp.asarray(batch.count, seen.dtype).reshape(())
    mean_apart = batch_mean - mean - mean_rest
    var_apart = batch_var - var - var_rest

    # The moments of the larger set are updated by the smaller one, as in `merge_moments`.
    is_bigger = seen >= count
    sign = jnp.where(is_bigger, 1.0, -1.0).astype(mean.dtype)
    share = (jnp.minimum(seen, count) / or_one(seen + count)).astype(mean.dtype)
    mean_change = sign * share * mean_apart
    var_change = share * (sign * var_apart + (1 - share) * mean_apart**2)

    def of_bigger(running: Array, of_batch: Array) -> Array:
        return jnp.where(is_bigger, running, of_batch)

    zero = jnp.zeros_like(mean)
    sums = (
        _add(of_bigger(mean, batch_mean), of_bigger(mean_rest, zero), mean_change),
        _add(of_bigger(var, batch_var), of_bigger(var_rest, zero), var_change),
        _add(seen, seen_rest, count),
    )
    values, rests = zip(*sums, strict=True)
    new: BatchStats = dict(zip((*LEAVES, *RESTS), (*values, *rests), strict=True))
    return {leaf: new[leaf] for leaf in batch_stats}


def _add(value: Array, rest: Array, amount: Array) -> tuple[Array, Array]:
    """Adds an amount to the pair `value + rest`, and returns the new value and rest.

    Knuth's TwoSum.
    """
    amount = rest + amount
    total = value + amount
    added = total - value
    return total, (value - (total - added)) + (amount - added)
