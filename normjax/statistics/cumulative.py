"""Computes, at each position along an axis such as time, statistics of all positions up to it."""

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
    r"""Returns the moments of what counts up to each position t of an axis that `spec` keeps.

    .. math:: N_t = \sum_{s \le t} n_s, \qquad
              \mu_t = r + \frac1{N_t} \sum_{s \le t} n_s (m_s - r), \qquad
              \sigma_t^2 = \frac1{N_t} \sum_{s \le t} n_s \left(v_s
              + \frac{N_{s-1}}{N_s} |m_s - \mu_{s-1}|^2\right)

    from count n, mean m and variance v of each position. The reference r is the mean of the first
    position that counts. So nothing cancels: the terms of the variance are not negative, and r is
    near the means, or so far from them that the variance is large. Nothing depends on later
    positions, not even by rounding. Where nothing counts up to t, the mean and the variance are 0.

    Returns:
      `Moments` with the rank of x, the variance in the unit of `spec`.
    """
    reference = lax.stop_gradient(_first_mean(spec, axis, x.x32, mask))
    apart = x.x32 - reference
    own = moments_by(two_passes, spec, Input(apart, apart), mask)
    # Stored before and after the sums along the axis, which else are taken for each element of x.
    count, mean, var = materialize(*_with_rank_of_x(spec, *own))
    total, offset = _running_means(axis, count, mean)
    between = count * (_before(axis, total) / or_one(total))
    jump = abs2((mean - _before(axis, offset)) * spec.unit(x.x))
    spread = lax.cumsum(count * var + between * jump, axis)
    total, offset, var = materialize(total, offset, spread / or_one(total))
    mean = jnp.where(total > 0, reference + offset, np.zeros((), offset.dtype))
    return Moments(total, mean, var)


def _first_mean(spec: ExampleSpec, axis: int, x: Array, mask: Mask | None) -> Array:
    """Returns the mean of the first position at which anything counts, with the rank of x."""
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
    """Returns how many elements count up to each position, and their mean."""
    total = lax.cumsum(count, axis)
    return total, ratio(lax.cumsum(count.astype(mean.dtype) * mean, axis), or_one(total))


def _before(axis: int, values: Array) -> Array:
    """Returns the value of the position before each one; 0 before the first one."""
    size = values.shape[axis]
    if isinstance(size, int) and size == 0:
        return values
    first = jnp.zeros_like(lax.slice_in_dim(values, 0, 1, axis=axis))
    # Padding would do, but jax2onnx takes no negative padding beside a symbolic size.
    return jnp.concatenate([first, lax.slice_in_dim(values, 0, size - 1, axis=axis)], axis)


def _with_rank_of_x(
    spec: ExampleSpec, count: Any, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    """Returns moments with the rank of x, and a count for each of them."""
    mean, var = spec.expand(mean), spec.expand(var)
    count = jnp.asarray(count, var.dtype)
    count = spec.expand(count) if count.ndim else count
    return jnp.broadcast_to(count, var.shape), mean, var
