"""Group normalization (Wu & He, 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import (
    Activations,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DTypeLike,
    Initializer,
    Mask,
    Params,
    PRNGKey,
)
from normjax.layers.affine import init_params
from normjax.layers.operands import (
    check_operands,
    check_spec,
    more_than_one_value,
    one_feature_axis,
)
from normjax.layers.standardize import (
    CumulativeSpec,
    StandardizeSpec,
    standardize,
    standardize_cumulatively,
)

DEFAULT_GROUPS = 32  # Wu & He (2018), table 3


@with_foreign_names
def group_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = ones,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters that `group_norm` starts from, and `{}`: it has no running statistics.

    Args:
      num_features: the number of channels (not of groups: each channel has its own scale and bias).
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias.
      scale_init: initializer of the scale; zeros for the last layer of a residual branch.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias.

    Returns:
      `params`: a dict of `scale` (ones) and `bias` (zeros), each `(num_features,)`; and an empty
        `batch_stats`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> print(nj.group_norm_init(4)[0]["scale"])
      [1. 1. 1. 1.]
    """
    if _foreign:
        raise_for_foreign(group_norm_init, _foreign)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    return init_params("group_norm_init", num_features, makers, key, param_dtype, scale_offset), {}


@jax.named_scope("group_norm")
@with_foreign_names
def group_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    num_groups: int | None = None,
    group_size: int | None = None,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    cumulative_axis: int | None = None,
    epsilon: float = 1e-5,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Normalizes each example by the mean and variance of groups of its channels.

    .. math:: y = (o + \gamma) \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta

    with the statistics of a group g of consecutive channels over all positions of one example. With
    one group, it is layer norm over all axes except the batch axis; with one channel per group, it
    is instance norm. Use it in convolutional networks whose batches are too small for batch norm
    (detection, segmentation, video, diffusion).

    With `cumulative_axis`, the statistics at position t of that axis are over all positions up to t
    that the mask counts. So y at t does not depend on later positions, as streaming requires.

    .. math:: \mu_t = \frac1{N_t} \sum_{s \le t} x_s, \qquad
              \sigma_t^2 = \frac1{N_t} \sum_{s \le t} |x_s - \mu_t|^2

    sequence-layers, praxis and the audio encoder of Gemma 3n (Hugging Face transformers) have this
    layer, but they sum :math:`|x_s - \mu_s|^2`, around the mean at s instead of the mean at t. That
    sum is not the variance, so their last position differs from plain group norm. This function
    uses the true variance.

    Args:
      params: dict of `scale` and `bias`, each `(channels,)`, or `(*leading, channels)` for a scale
        and bias per example. Leading dimensions must match the first axes of x. Missing leaves are
        skipped.
      batch_stats: `{}`.
      x: floating-point or complex, such as `(batch, height, width, channels)`.
      train: Python bool. Training and inference compute the same values.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      num_groups: the number of groups, a divisor of the number of channels. The default is 32,
        unless `group_size` is given.
      group_size: the number of channels in a group, instead of `num_groups`.
      reduction_axes: the axes over which the mean and variance are computed; by default all but the
        first. They must include the feature axis. If x has more than one batch axis, leave out all
        of them.
      feature_axes: the axis of the channels.
      cumulative_axis: the axis along which statistics are cumulative, such as 1 for `(batch, time,
        channels)`. It must be one of `reduction_axes`. None computes each statistic over all
        positions.
      epsilon: added to the variance.
      mask: bool, broadcastable to x, True for elements that count; or non-negative weights, one per
        element. Elements that do not count do not affect the statistics. If one of them is NaN or
        infinite, its y is the bias, which derivatives treat as a constant. If no element counts (up
        to t), the mean is 0 and the variance is 1. For `paddings` of shape (batch, time), pass
        `mask=(paddings == 0)[..., None]`.
      axis_name: mapped axis or axes over which `reduction_axes` (except `cumulative_axis`) are
        sharded. Statistics are all-reduced over them. If the channels are sharded, group i
        consists of the i-th groups of all devices.
      axis_index_groups: groups of indices of that axis; each group shares statistics, as in
        `jax.lax.psum`.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and `{}`. Statistics and y are computed in at least float32, and y
      is rounded once. The variance stays accurate if x is far from zero. y and its gradients are
      accurate for x up to 1e25.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an invalid argument: groups that do not
        divide the channels, wrong axes, leaves, dtypes or masks, an axis name that is not in scope,
        or statistics over a single value in training.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.group_norm_init(4)
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> print(nj.group_norm(params, batch_stats, x, train=True, num_groups=2)[0].round(3))
      [[-1.  1. -1.  1.]]

      >>> x = jnp.array([[[1.0, 3.0], [6.0, 6.0], [0.0, 90.0]]])  # (batch, time, channels)
      >>> y, _ = nj.group_norm({}, {}, x, train=True, num_groups=1, cumulative_axis=1)
      >>> print(y[0, :2].round(3))
      [[-1.     1.   ]
       [ 0.943  0.943]]

    References:
      Wu & He, "Group Normalization" (ECCV 2018), eq. 1-7.
    """
    if _foreign:
        raise_for_foreign(group_norm, _foreign)
    function = "group_norm"
    operands = check_operands(
        function,
        params,
        batch_stats,
        x,
        train,
        feature_axes=feature_axes,
        mask=mask,
        dtype=dtype,
        find_axes=partial(one_feature_axis, function),
    )
    (channel,) = operands.feature_axes
    shape = operands.x.shape
    num_groups = _number_of_groups(shape[channel], num_groups, group_size, shape)
    axes = (*{*range(1, len(shape)), channel},) if reduction_axes is None else reduction_axes
    axes = _checks.axes(function, "reduction_axes", axes, shape)
    _must_hold_channels(axes, channel, shape)
    kept = {channel} | _cumulative(cumulative_axis, channel, axes, shape)
    spec = check_spec(
        function,
        operands,
        tuple(axis for axis in axes if axis not in kept),
        epsilon,
        axis_name,
        axis_index_groups,
        StandardizeSpec,
        scale_offset=scale_offset,
        groups=(channel, shape[channel] // num_groups or 1),
    )
    if train:
        whole = tuple(axis for axis in axes if axis != channel)
        more_than_one_value(function, operands.x, replace(spec, axes=whole))
    step = standardize
    if cumulative_axis is not None:
        (along,) = kept - {channel}
        spec, step = CumulativeSpec(**vars(spec), cumulative_axis=along), standardize_cumulatively
    return step(operands.params, operands.x, operands.mask, spec), batch_stats


def _cumulative(
    given: int | None, channel: int, axes: tuple[int, ...], shape: tuple[int, ...]
) -> set[int]:
    """Returns the axis along which statistics are cumulative, as a set of at most one axis."""
    if given is None:
        return set()
    found = _checks.axes("group_norm", "cumulative_axis", given, shape)
    if len(found) != 1 or found == (channel,) or not set(found) <= set(axes):
        _checks.raise_error(
            "group_norm",
            "statistics cannot be cumulative along this axis",
            expected=f"one of the reduced axes {axes} except the channel axis {channel}",
            got=f"cumulative_axis={given!r} for x.shape={shape}",
            fix="Pass the time axis, such as cumulative_axis=1 for (batch, time, channels)",
        )
    return set(found)


def _number_of_groups(
    channels: int, num_groups: int | None, group_size: int | None, shape: tuple[int, ...]
) -> int:
    """Returns the number of groups; raises an error if it does not divide the channels."""
    name, asked = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if num_groups is not None and group_size is not None:
        _checks.raise_error(
            "group_norm",
            "num_groups and group_size are both given",
            expected="one of them",
            got=f"num_groups={num_groups!r} and group_size={group_size!r}",
            fix="Drop one",
        )
    positive = _checks.positive_int(DEFAULT_GROUPS if asked is None else asked)
    if positive is None or channels % positive:
        divisors = [divisor for divisor in range(1, channels + 1) if channels % divisor == 0]
        _checks.raise_error(
            "group_norm",
            f"{name} does not divide the channels",
            expected=f"a divisor of {channels}",
            got=f"{name}={asked if positive is None else positive!r} for x.shape={shape}",
            fix=f"Choose one of {divisors}",
        )
    return positive if group_size is None else max(channels // positive, 1)


def _must_hold_channels(axes: tuple[int, ...], channel: int, shape: tuple[int, ...]) -> None:
    if channel not in axes:
        _checks.raise_error(
            "group_norm",
            "reduction_axes lacks the channels, which group statistics are over",
            expected=f"reduction_axes that include the feature axis {channel}",
            got=f"reduction_axes={axes} for x.shape={shape}",
            fix="Add it, or use instance_norm",
        )
