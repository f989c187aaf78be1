"""Computes cumulative statistics along an axis such as time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from normjax._typing import Mask
from normjax.platforms.cpu import materialize
from normjax.statistics.elements import Input, abs2, masked
from normjax.statistics.per_example import ExampleSpec
from normjax.statistics.reduction import moments_by, ratio, total_over_count, two_passes
from normjax.statistics.spec import Moments, or_one


def cumulative_moments(spec: ExampleSpec, axis: int, x: Input, mask: Mask | None) -> Moments:
    r"""Returns the moments of the elements up to each position t of an axis that `spec` keeps.

    .. math:: N_t = \sum_{s \le t} n_s, \qquad
              \mu_t = r + \frac1{N_t} \sum_{s \le t} n_s (m_s - r), \qquad
              \sigma_t^2 = \frac1{N_t} \sum_{s \le t} n_s \left(v_s
              + \frac{N_{s-1}}{N_s} |m_s - \mu_{s-1}|^2\right)

    with the count n, mean m and variance v of each position. The reference r is the mean of the
    first position that counts. There is no cancellation: the terms of the variance are
    non-negative, and r is near the means, or so far from them that the variance is large. Nothing
    depends on later positions, not even through rounding. If no element counts up to t, mean and
    variance are 0.

    Returns:
      `Moments` with the rank of x. The variance is in the unit of `spec`.
    """
    reference = lax.stop_gradient(_first_mean(spec, axis, x.x32, mask))
    apart = x.x32 - reference
    own = moments_by(two_passes, spec, Input(apart, apart), mask)
    # Materialized before and after the cumulative sums; else XLA recomputes them per element of x.
    count, mean, var = materialize(*_with_rank_of_x(spec, *own))
    total, offset = _running_means(axis, count, mean)
    between = count * (_before(axis, total) / or_one(total))
    jump = abs2((mean - _before(axis, offset)) * spec.unit(x.x))
    spread = lax.cumsum(count * var + between * jump, axis)
    total, offset, var = materialize(total, offset, spread / or_one(total))
    mean = jnp.where(total > 0, reference + offset, np.zeros((), offset.dtype))
    return Moments(total, mean, var)


def _first_mean(spec: ExampleSpec, axis: int, x: Array, mask: Mask | None) -> Array:
    """Returns the mean of the first position that has elements that count, with the rank of x."""
    if mask is None:
        sizes = [*x.shape]
        sizes[axis] = min(sizes[axis], 1) if isinstance(sizes[axis], int) else 1
        _, mean = total_over_count(spec, lax.slice(x, [0] * x.ndim, sizes), None)
        return spec.expand(mean)
    count, mean = total_over_count(spec, masked(x, mask), mask)
    count, mean, _ = _with_rank_of_x(spec, count, mean, mean.real)
    total = lax.cumsum(count, axis)
    is_first = (count > 0) & (_before(axis, total) == 0)
    return jnp.sum(jnp.where(is_first, mean, np.zeros((), mean.dtype)), axis, keepdims=True)


def _running_means(axis: int, count: Array, mean: Array) -> tuple[Array, Array]:
    """Returns the number of elements that count up to each position, and their mean."""
    total = lax.cumsum(count, axis)
    return total, ratio(lax.cumsum(count.astype(mean.dtype) * mean, axis), or_one(total))


def _before(axis: int, values: Array) -> Array:
    """Shifts values by one position along the axis; the first position gets 0."""
    size = values.shape[axis]
    if isinstance(size, int) and size == 0:
        return values
    first = jnp.zeros_like(lax.slice_in_dim(values, 0, 1, axis=axis))
    # Not lax.pad: jax2onnx does not accept negative padding with a symbolic size.
    return jnp.concatenate([first, lax.slice_in_dim(values, 0, size - 1, axis=axis)], axis)


def _with_rank_of_x(
    spec: ExampleSpec, count: Any, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """Returns moments with the rank of x, including the count."""
    mean, var = spec.expand(mean), spec.expand(var)
    count = jnp.asarray(count, var.dtype)
    count = spec.expand(count) if count.ndim else count
    return jnp.broadcast_to(count, var.shape), mean, var
