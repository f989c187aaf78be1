"""Statistics as users see them: count, mean and variance, and how those of several sets combine."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from normjax import _checks
from normjax._typing import Activations, Axes, AxisIndexGroups, AxisName, Mask, widen
from normjax.statistics.devices import (
    ALONE,
    DeviceGroup,
    device_group,
    explicit_mesh,
    laid_out_by_the_compiler,
    spec_of,
)
from normjax.statistics.reduction import Input, Moments, Spec, abs2, batch_moments


def moments(
    x: Activations,
    reduction_axes: Axes,
    *,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    r"""Returns count, mean and biased variance of `x` over some of its axes, and over devices.

    .. math:: \mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac1n \sum_i |x_i - \mu|^2

    The variance is safe: not the difference of two large numbers. One pass over `x` suffices where
      the data lie near
    zero; a second, shifted by the first one's mean, is taken where some feature's mean is more than
    8 standard deviations away from it.

    Args:
      x: floating-point or complex array of any rank >= 1.
      reduction_axes: the axes to reduce; the features are those that remain, in their order.
      mask: bool, broadcastable to `x`; True where an element counts. What it hides may be NaN.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) to take the statistics over, too.
      axis_index_groups: groups of indices of that axis that share, as in `jax.lax.psum`.

    Returns:
      `Moments` of shape `(*features)`, in at least float32. Where nothing counts: count 0, mean 0,
      var 0.

    Raises:
      ValueError, TypeError, NameError: for axes, a mask or an axis name that do not fit `x`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0]])
      >>> count, mean, var = nj.moments(x, 0)
      >>> print(count, mean, var)
      [2. 2.] [ 2. 10.] [1. 0.]

    References:
      Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American
      Statistician 37 (1983): shifted data (eq. 1.4-1.5) and the pairwise update (eq. 2.1).
    """
    x = _checks.activations("moments", x)
    axes = _checks.axes("moments", "reduction_axes", reduction_axes, x.shape)
    mask = _checks.mask("moments", mask, x.shape)
    spec = Spec(axes, devices=device_group("moments", axis_name, axis_index_groups))
    return compiled_moments(spec, x, mask)


def compiled_moments(spec: Spec, x: Array, mask: Array | None) -> Moments:
    """Returns the moments of x; compiled, so that eager calls compile the branch once."""
    mesh = explicit_mesh(x, mask)
    if mesh is None:
        return _compiled_moments(spec, x, mask)
    sharded = enumerate(spec_of(x))
    features = PartitionSpec(*[over for axis, over in sharded if axis not in spec.axes])
    each: Any = [features] * 3
    results = Moments(*each)
    return laid_out_by_the_compiler(partial(_compiled_moments, spec), mesh, results)(x, mask)


@partial(jax.jit, static_argnums=0, inline=True)
def _compiled_moments(spec: Spec, x: Array, mask: Array | None) -> Moments:
    count, mean, var = batch_moments(spec, Input(x, widen(x)), mask)
    return Moments(count + jnp.zeros_like(var), mean, var)


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""Returns the moments of the union of two disjoint sets of elements.

    .. math:: n = n_a + n_b, \qquad \mu = \frac{n_a \mu_a + n_b \mu_b}{n}, \qquad
              \sigma^2 = \frac1n \sum_{k \in a, b} n_k \left(\sigma_k^2 + |\mu_k - \mu|^2\right)

    Exact, commutative, and associative up to rounding: microbatches, devices and calibration
    batches can be merged in any order. An empty set (count 0) changes nothing, whatever its mean
    and variance are.

    Args:
      a: moments of the one set, of any shape.
      b: moments of the other, broadcastable to it.

    Returns:
      `Moments` in the precision of the inputs.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> a, b = nj.moments(jnp.array([[1.0], [3.0]]), 0), nj.moments(jnp.array([[8.0]]), 0)
      >>> print(nj.merge_moments(a, b).mean, nj.moments(jnp.array([[1.0], [3.0], [8.0]]), 0).mean)
      [4.] [4.]

    References:
      Chan, Golub & LeVeque (1983), eq. 2.1.
    """
    paired = (jnp.stack(jnp.broadcast_arrays(*pair)) for pair in zip(a, b, strict=True))
    return merge_stacked(Moments(*paired))


def merge_stacked(moments: Moments) -> Moments:
    """Merges moments that lie along the first axis, as `merge_moments` would one after the other."""
    counts = jnp.broadcast_to(moments.count, moments.var.shape)
    counted = counts > 0
    count = jnp.sum(counts, 0)
    weights = counts / jnp.maximum(count, 1)
    means, variances = jnp.where(counted, moments.mean, 0), jnp.where(counted, moments.var, 0)
    mean = jnp.sum(weights.astype(means.dtype) * means, 0)
    return Moments(count, mean, jnp.sum(weights * (variances + abs2(means - mean)), 0))


def merge_over(devices: DeviceGroup, own: Moments) -> Moments:
    """Merges the moments that each device has of its own, in two collectives.

    One would do around zero, and would cancel if the means are far from it.
    """
    if devices == ALONE:
        return own
    count = jnp.broadcast_to(own.count, own.var.shape).astype(own.var.dtype)
    counted = count > 0
    mean, var = jnp.where(counted, own.mean, 0), jnp.where(counted, own.var, 0)
    total, sums = devices.sum(count, count.astype(mean.dtype) * mean)
    n = jnp.maximum(total, 1)
    center = sums / n.astype(sums.dtype)
    (spread,) = devices.sum(count * (var + abs2(mean - center)))
    return Moments(total, center, spread / n)
