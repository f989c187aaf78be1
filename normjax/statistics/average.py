"""Averages of running statistics: those of an average of models, or of checkpoints of one."""

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
    r"""Returns the running statistics of a mixture of populations, in proportion to weights.

    .. math:: \mu = \sum_i w_i \mu_i, \qquad
              \sigma^2 = \sum_i w_i \left(\sigma_i^2 + |\mu_i - \mu|^2\right), \qquad \sum_i w_i = 1

    The variance also counts how far the means lie apart (the law of total variance). The mean of
    the variances alone, which `optax.incremental_update` and a mean over the tree give, leaves that
    out, and is too small.

    Use it to average what several runs, checkpoints or clients have seen, or step by step for a
    moving average (EMA): `average_batch_stats([average, batch_stats], [0.99, 0.01])`. If the
    weights of the network are averaged too, no batch was ever normalized by that network:
    `recalibrate` measures its statistics, and is the better choice if there are data for it.

    Args:
      states: the `batch_stats` of one layer, or of a whole model, several times: dicts of dicts of
        one structure, as in Flax's `batch_stats` collection.
      weights: one for each state, not negative; they are divided by their sum. None: all count
        alike. A state of weight 0 leaves no trace, also if it holds NaN.

    Returns:
      A tree of the structure, shapes and dtypes of the first state, in arrays of its own. All
      leaves other than `var` take the weighted mean. That of ints is rounded: so `count` says at
      which batch of a run the average stands, which is what the schedules of batch renorm go by. If
      the states come from separate data with `momentum=None`, pass their counts as weights; then
      mean and variance are those of all batches together, and their count is the sum.

    Raises:
      ValueError, TypeError: for no states, states that differ in structure or shape, a `var`
        without a `mean` beside it, and weights that are negative, all zero, or of another number.

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
    """The weighted mean, as that of the distances from the state that counts most.

    So equal values give that value, and counts are exact beyond float32's 2^24.
    """
    stacked = jnp.stack([leaf.astype(given[0].dtype) for leaf in given])
    center = stacked[jnp.argmax(shares)][None]
    mean = _weighted((stacked - center).astype(_wide(stacked.dtype)), shares)
    if jnp.issubdtype(stacked.dtype, jnp.integer):
        return center[0] + jnp.round(mean).astype(stacked.dtype)
    return (center[0].astype(mean.dtype) + mean).astype(stacked.dtype)


def _var(variances: list[Array], means: list[Array], shares: Array) -> Array:
    """The weighted mean of the variances and of the squared distances of the means from theirs."""
    dtype = _wide(variances[0].dtype)
    stacked = jnp.stack([mean.astype(_wide(mean.dtype)) for mean in means])
    center = stacked[jnp.argmax(shares)][None]
    offset = _weighted(stacked - center, shares)
    spreads = abs2(stacked - center - offset[None])
    spread_and_var = jnp.stack([var.astype(dtype) for var in variances]) + spreads.astype(dtype)
    return _weighted(spread_and_var, shares).astype(variances[0].dtype)


def _weighted(stacked: Array, shares: Array) -> Array:
    """The weighted sum over the first axis; 0 times NaN is 0."""
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
            "weights cannot be shares",
            expected=f"{states} finite numbers, not negative, with a sum above 0",
            got=f"weights={weights!r}",
            fix="Pass one for each state, or None for equal ones",
        )
    return given / jnp.sum(given)


def _are_weights(weights: np.ndarray) -> bool:
    return bool((weights >= 0).all()) and 0 < float(weights.sum()) < math.inf
