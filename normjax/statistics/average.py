"""Averages running statistics of several models, checkpoints or clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PyTree

from normjax import _checks
from normjax._trees import check_alike, check_arrays
from normjax._typing import promote
from normjax.statistics.elements import abs2
from normjax.statistics.synchronize import means_beside

FUNCTION = "average_batch_stats"


def average_batch_stats(
    states: Sequence[PyTree[Array]], weights: ArrayLike | Sequence[ArrayLike] | None = None
) -> PyTree[Array]:
    r"""Averages running statistics, including the variance between their means.

    .. math:: \mu = \sum_i w_i \mu_i, \qquad
              \sigma^2 = \sum_i w_i \left(\sigma_i^2 + |\mu_i - \mu|^2\right), \qquad \sum_i w_i = 1

    The variance includes the differences between the means (the law of total variance).
    `optax.incremental_update` or a mean over the tree only averages the variances, and the result
    is too small.

    Use it to average the statistics of several runs, checkpoints or clients, or at each step for a
    moving average (EMA): `average_batch_stats([average, batch_stats], [0.99, 0.01])`. If you also
    average the weights of the network, no batch has ever passed through the averaged network.
    Prefer `recalibrate` then, which measures its statistics, if you have data.

    Args:
      states: a list of the `batch_stats` of one layer or of a whole model: nested dicts of the same
        structure, as in Flax's `batch_stats` collection.
      weights: a non-negative weight for each state; they are divided by their sum. None means equal
        weights. A state of weight 0 has no effect, even if it contains NaN.

    Returns:
      A tree of new arrays, with the structure, shapes and dtypes of the first state. All leaves
      other than `var` are the weighted mean, which is rounded for ints. So `count` is the average
      number of batches, as the schedules of batch renorm need it. If the states come from separate
      data with `momentum=None`, pass their counts as weights. Mean and variance are then exact for
      all batches together, whose count is the sum of the counts.

    Raises:
      ValueError, TypeError: if there are no states, if states differ in structure or shape, if
        there is a `var` without a `mean` beside it, or if weights are negative, all zero, or not
        one per state.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> a = {"mean": jnp.array([0.0]), "var": jnp.array([1.0]), "count": jnp.int32(10)}
      >>> b = {"mean": jnp.array([4.0]), "var": jnp.array([1.0]), "count": jnp.int32(30)}
      >>> average = nj.average_batch_stats([a, b])
      >>> print(average["mean"], average["var"], average["count"])
      [2.] [5.] 20

    References:
      Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), eq. 2.1.
    """
    states = _check_states(states)
    shares = _check_weights(weights, len(states))
    leaves, structure = jax.tree.flatten_with_path(states[0])
    others = [jax.tree.leaves(state) for state in states]
    values = {
        path: [jnp.asarray(leaf) for leaf in given]
        for (path, _), given in zip(leaves, zip(*others, strict=True), strict=True)
    }
    beside = means_beside(FUNCTION, list(values))
    average = {path: _mean(given, shares) for path, given in values.items() if path not in beside}
    for path, mean in beside.items():
        average[path] = _var(values[path], values[mean], shares)
    return jax.tree.unflatten(structure, [average[path] for path in values])


def _mean(given: list[Array], shares: Array) -> Array:
    """Returns the weighted mean, summed as differences from the state with the largest weight.

    So the mean of equal values is exact, and counts are exact beyond float32's 2^24.
    """
    stacked = jnp.stack([leaf.astype(given[0].dtype) for leaf in given])
    center = stacked[jnp.argmax(shares)][None]
    mean = _weighted((stacked - center).astype(_wide(stacked.dtype)), shares)
    if jnp.issubdtype(stacked.dtype, jnp.integer):
        return center[0] + jnp.round(mean).astype(stacked.dtype)
    return (center[0].astype(mean.dtype) + mean).astype(stacked.dtype)


def _var(variances: list[Array], means: list[Array], shares: Array) -> Array:
    """Returns the weighted mean of the variances plus squared deviations of the means."""
    dtype = _wide(variances[0].dtype)
    stacked = jnp.stack([mean.astype(_wide(mean.dtype)) for mean in means])
    center = stacked[jnp.argmax(shares)][None]
    offset = _weighted(stacked - center, shares)
    spreads = abs2(stacked - center - offset[None])
    spread_and_var = jnp.stack([var.astype(dtype) for var in variances]) + spreads.astype(dtype)
    return _weighted(spread_and_var, shares).astype(variances[0].dtype)


def _weighted(stacked: Array, shares: Array) -> Array:
    """Returns the weighted sum over the first axis, in which 0 times NaN is 0."""
    real = jnp.finfo(stacked.dtype).dtype
    column = shares.astype(real).reshape(-1, *(1,) * (stacked.ndim - 1))
    return jnp.sum(jnp.where(column > 0, column.astype(stacked.dtype) * stacked, 0), 0)


def _wide(dtype: Any) -> Any:
    return promote(dtype, jnp.float32)


def _check_states(states: Any) -> list[PyTree[Array]]:
    listed = [] if isinstance(states, Mapping) else list(states)
    if not listed:
        _checks.raise_error(
            FUNCTION,
            "there are no states to average",
            expected="a list of one or more batch_stats",
            got=f"states of type {type(states).__name__}",
            fix="Pass several: average_batch_stats([batch_stats, other])",
        )
    for index, state in enumerate(listed):
        check_arrays(FUNCTION, f"states[{index}]", state)
        if index:
            check_alike(FUNCTION, (f"states[{index}]", state), ("states[0]", listed[0]))
    return listed


def _check_weights(weights: Any, states: int) -> Array:
    """Returns weights that add up to 1."""
    if weights is None:
        return jnp.full(states, 1 / states)
    given = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    known = not isinstance(given, Tracer)
    if given.shape != (states,) or (known and not _are_weights(np.asarray(given))):
        _checks.raise_error(
            FUNCTION,
            "weights are not valid",
            expected=f"{states} finite numbers, not negative, with a sum above 0",
            got=f"weights={weights!r}",
            fix="Pass one weight for each state, or None for equal weights",
        )
    return given / jnp.sum(given)


def _are_weights(weights: np.ndarray) -> bool:
    return bool((weights >= 0).all()) and 0 < float(weights.sum()) < math.inf
