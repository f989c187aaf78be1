"""Subtract the mean of each example, divide by its deviation: what layer, group and instance norm have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from normjax._typing import Params
from normjax.layers._affine import normalize
from normjax.layers._arguments import compiled
from normjax.statistics.moments import merge_stacked
from normjax.statistics.per_example import two_pass_moments
from normjax.statistics.reduction import Moments, Reduction, widen


class Plan(NamedTuple):
    """What is static about a step; hashable, so that eager calls compile it once.

    Attributes:
      how: the reduction; with groups, that of each channel.
      dtype: of y.
      channel_axis: with groups: where the channels are in the statistics.
      num_groups: how many groups of consecutive channels share their statistics.
      gain: a constant factor of the scale.
    """

    how: Reduction
    dtype: Any
    channel_axis: int = 0
    num_groups: int | None = None
    gain: float = 1.0


@compiled
def standardize(params: Params, x: Array, mask: Array | None, plan: Plan) -> Array:
    """Normalizes x by its own moments; params and mask have its rank."""
    wide = widen(x)
    count, mean, var = two_pass_moments(wide, plan.how, mask)
    if plan.num_groups is not None:
        count, mean, var = _share_in_groups(Moments(count, mean, var), plan.channel_axis, plan.num_groups)
    if mask is not None:
        var = jnp.where(jnp.asarray(count) > 0, var, 1)
    mean, var = plan.how.expand(mean), plan.how.expand(var)
    if plan.gain != 1:
        params = params | {"scale": params.get("scale", jnp.ones((), var.dtype)) * plan.gain}
    return normalize(wide, mean, var, params, mask=mask, epsilon=plan.how.epsilon).astype(plan.dtype)


def _share_in_groups(channels: Moments, axis: int, num_groups: int) -> Moments:
    """Merges the moments of the channels of each group, and gives each channel those of its group.

    x itself is never cut into groups: its minor axis would be as small as a group, which accelerators pad.
    """
    size = channels.var.shape[axis] // num_groups

    def members_first(statistic: Array) -> Array:
        cut = statistic.reshape(*statistic.shape[:axis], num_groups, size, *statistic.shape[axis + 1 :])
        return jnp.moveaxis(cut, axis + 1, 0)

    groups = merge_stacked(Moments(*map(members_first, channels)))
    return Moments(*(jnp.repeat(statistic, size, axis) for statistic in groups))
