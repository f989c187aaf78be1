"""Computes the count, mean and variance of arrays."""

from __future__ import annotations

from functools import partial
from typing import Any, Never

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Activations, Axes, AxisIndexGroups, AxisName, Mask, widen
from normjax.statistics.devices import (
    device_group,
    explicit_mesh,
    laid_out_by_the_compiler,
    spec_of,
)
from normjax.statistics.elements import Input
from normjax.statistics.reduction import batch_moments
from normjax.statistics.spec import Moments, Spec


@with_foreign_names
def moments(
    x: Activations,
    reduction_axes: Axes,
    *,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    **_foreign: Never,
) -> Moments:
    r"""Computes the count, mean and biased variance of `x` over some of its axes, and over devices.

    .. math:: \mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac1n \sum_i |x_i - \mu|^2

    The variance is safe: it is not the difference of two large numbers. One pass over `x` suffices
    if the data are near zero. If the mean of any feature is more than 8 standard deviations away
    from zero, a second pass is made, around the mean of the first pass.

    Args:
      x: floating-point or complex array of any rank >= 1.
      reduction_axes: the axes to reduce; the features are those that remain, in their order.
      mask: bool, broadcastable to `x`, True for elements that count; other elements may be NaN. Or
        a non-negative weight w for each element, with :math:`n = \sum_i w_i`, :math:`\mu = \frac1n
        \sum_i w_i x_i`, :math:`\sigma^2 = \frac1n \sum_i w_i |x_i - \mu|^2`; weights have
        gradients.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) over which the statistics are
        all-reduced.
      axis_index_groups: groups of indices of that axis; each group shares statistics, as in
        `jax.lax.psum`.

    Returns:
      `Moments` of shape `(*features)`, in at least float32. If no element counts, count, mean and
      var are 0.

    Raises:
      ValueError, TypeError, NameError: if axes or mask do not fit `x`, or an axis name is not in
        scope.

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
    if _foreign:
        raise_for_foreign(moments, _foreign)
    x = _checks.activations("moments", x)
    axes = _checks.axes("moments", "reduction_axes", reduction_axes, x.shape)
    mask = _checks.mask("moments", mask, x.shape)
    spec = Spec(axes, devices=device_group("moments", axis_name, axis_index_groups))
    return compiled_moments(spec, x, mask)


def compiled_moments(spec: Spec, x: Array, mask: Array | None) -> Moments:
    """Returns the moments of x. It is compiled, so that eager calls compile the branch once."""
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
