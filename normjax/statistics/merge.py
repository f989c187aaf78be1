"""Merges the moments of several sets, such as microbatches, ghost batches or devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from normjax import _leaves
from normjax.statistics.devices import ALONE, DeviceGroup
from normjax.statistics.elements import abs2
from normjax.statistics.spec import Moments, or_one

# Up to this many devices all-gather their moments, in one collective whose bytes grow with their
# number. More devices add up sums, with two collectives.
FEW_DEVICES = 64


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""Returns the moments of the union of two disjoint sets of elements.

    .. math:: n = n_a + n_b, \qquad \mu = \frac{n_a \mu_a + n_b \mu_b}{n}, \qquad
              \sigma^2 = \frac1n \sum_{k \in a, b} n_k \left(\sigma_k^2 + |\mu_k - \mu|^2\right)

    Merging is exact and commutative, and associative up to rounding, so microbatches, devices and
    calibration batches can be merged in any order. An empty set (count 0) has no effect, whatever
    its mean and variance are.

    Counts keep their dtype. The float32 counts of `moments` are exact up to 2^24 elements. Beyond
    that, sums are rounded, and a set of less than 6e-8 of the whole no longer increases the count.
    If you merge many small sets, convert both counts to ints, which are exact up to 2^31 - 1 and
    saturate there: `a._replace(count=a.count.astype(jnp.int32))`.

    Args:
      a: moments of one set, of any shape.
      b: moments of the other set, broadcastable to it.

    Returns:
      `Moments` in the dtype of the inputs.

    Raises:
      ValueError, TypeError: if an argument is not `Moments`, or if the shapes do not broadcast.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> a, b = nj.moments(jnp.array([[1.0], [3.0]]), 0), nj.moments(jnp.array([[8.0]]), 0)
      >>> print(nj.merge_moments(a, b).mean, nj.moments(jnp.array([[1.0], [3.0], [8.0]]), 0).mean)
      [4.] [4.]

    References:
      Chan, Golub & LeVeque (1983), eq. 2.1.
    """
    _leaves.moments("merge_moments", a=a, b=b)
    shape = jnp.broadcast_shapes(*(jnp.shape(part) for part in (*a, *b)))
    one, other = _of_shape(a, shape), _of_shape(b, shape)
    bigger = one.count >= other.count
    big, small = _choose(bigger, one, other), _choose(bigger, other, one)
    count = _added(big.count, small.count)
    share = small.count.astype(big.var.dtype) / or_one(count).astype(big.var.dtype)
    apart = small.mean - big.mean
    # The larger set is updated by the smaller one. With two rounded weights, whose sum is not
    # exactly 1, each of millions of merges would shift the mean by a rounding error.
    mean = big.mean + share.astype(apart.dtype) * apart
    var = big.var + share * (small.var - big.var)
    # If both sets are equally large, the result must not depend on their order.
    equal = one.count == other.count
    mean = jnp.where(equal, big.mean / 2 + small.mean / 2, mean)
    var = jnp.where(equal, big.var / 2 + small.var / 2, var)
    var = var + jnp.where(small.count > 0, share * (1 - share) * abs2(apart), 0)
    return Moments(count, mean, jnp.maximum(var, 0.0))


class _Set(NamedTuple):
    """Moments of one shape, all of them arrays."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array
    var: Array


def _of_shape(moments: Moments, shape: tuple[int, ...]) -> _Set:
    """Broadcasts moments to a shape; the moments of an empty set are zeros."""
    count, mean, var = (jnp.broadcast_to(part, shape) for part in moments)
    return _Set(count, jnp.where(count > 0, mean, 0), jnp.where(count > 0, var, 0))


def _choose(condition: Array, yes: _Set, no: _Set) -> _Set:
    with jax.numpy_dtype_promotion("standard"):  # a count may be an int, or a number
        return _Set(*(jnp.where(condition, one, other) for one, other in zip(yes, no, strict=True)))


def _added(a: Array, b: Array) -> Array:
    """Returns the sum of two counts. Ints saturate instead of wrapping around."""
    if not jnp.issubdtype(a.dtype, jnp.integer):
        return a + b
    return a + jnp.minimum(b, jnp.iinfo(a.dtype).max - a)


def merge_stacked(moments: Moments) -> Moments:
    """Merges moments along the first axis, which stacks ghost batches or devices."""
    counts = jnp.broadcast_to(moments.count, moments.var.shape)
    counted = counts > 0
    count = jnp.sum(counts, 0)
    weights = counts / or_one(count)[None]
    means, variances = jnp.where(counted, moments.mean, 0), jnp.where(counted, moments.var, 0)
    mean = jnp.sum(weights.astype(means.dtype) * means, 0)
    return Moments(count, mean, jnp.sum(weights * (variances + abs2(means - mean[None])), 0))


def merge_over(devices: DeviceGroup, own: Moments) -> Moments:
    """Merges the moments of all devices.

    Sums around zero would need only one collective, but cancel if the means are far from zero.
    """
    if devices == ALONE:
        return own
    count = jnp.broadcast_to(own.count, own.var.shape).astype(own.var.dtype)
    if devices.size <= FEW_DEVICES:
        return merge_stacked(Moments(*devices.gather(count, own.mean, own.var)))
    counted = count > 0
    mean, var = jnp.where(counted, own.mean, 0), jnp.where(counted, own.var, 0)
    total, sums = devices.sum(count, count.astype(mean.dtype) * mean)
    n = or_one(total)
    center = sums / n.astype(sums.dtype)
    (spread,) = devices.sum(count * (var + abs2(mean - center)))
    return Moments(total, center, spread / n)
