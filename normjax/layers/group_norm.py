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
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      scale_init: makes the scale; zeros for the last layer of a residual branch.
      scale_offset: what the layer adds to the scale. `ones`, the default of `scale_init`, then
        makes `1 - scale_offset`.
      bias_init: makes the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias.

    Returns:
      `params`: a dict of `scale` (ones) and `bias` (zeros), each `(num_features,)`; and an empty
        `batch_stats`.

    Raises:
      ValueError: for a size that is not positive. TypeError: for an integer `param_dtype`, or a
        random initializer without a key.

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

    with the statistics of a group g of consecutive channels, over all positions of one example.
    With one group it is layer norm over all axes but the batch, and with groups of one channel it
    is instance norm. Use it in convolutional networks whose batches are too small for batch norm
    (detection, segmentation, video, diffusion).

    With `cumulative_axis`, the statistics at a position t of that axis are over all positions up to
    t that the mask counts: y at t does not depend on what comes later, as streaming needs it.

    .. math:: \mu_t = \frac1{N_t} \sum_{s \le t} x_s, \qquad
              \sigma_t^2 = \frac1{N_t} \sum_{s \le t} |x_s - \mu_t|^2

    sequence-layers, praxis and Gemma 3n's audio encoder (Hugging Face transformers) have this
    layer. They add up each :math:`|x_s - \mu_s|^2`, around the mean at s in place of t. That is not
    the variance, and at the last position it is not plain group norm. Here it is the variance.

    Args:
      params: dict of `scale` and `bias`, each `(channels,)`, or `(*leading, channels)` for one of
        each example. Leading sizes must match the first axes of x. Missing leaves are left out.
      batch_stats: `{}`.
      x: floating-point or complex, such as `(batch, height, width, channels)`.
      train: Python bool.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      num_groups: the number of groups, a divisor of the number of channels. It is 32 if neither
        this nor `group_size` is given.
      group_size: the number of channels in a group, instead of `num_groups`.
      reduction_axes: the axes that mean and variance are taken over, the feature axis among them;
        all but the first by default. Leave out further axes of examples.
      feature_axes: the axis of the channels.
      cumulative_axis: the axis that the statistics grow along, such as 1 for `(batch, time,
        channels)`, one of `reduction_axes`. None: each statistic is over all positions.
      epsilon: added to the variance.
      mask: bool, broadcastable to x: True where an element counts; or real and not negative: the
        weight of each element. Elements that do not count do not affect the statistics; if one is
        NaN or infinite, y is the bias there, a constant. If nothing counts (up to t), the mean is 0
        and the variance 1. For paddings, of shape (batch, time): `mask=(paddings == 0)[..., None]`.
      axis_name: mapped axis or axes that `reduction_axes` (but `cumulative_axis`) are sharded over:
        statistics are shared over them. If the channels are sharded, the first groups of all
        devices form one group, and so on.
      axis_index_groups: groups of indices of that axis that share statistics, as in `jax.lax.psum`.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, of x's shape, and `{}`. Computed in at least float32 and rounded once; the variance is
      safe far from zero. y and its gradients are right for x up to 1e25.

    Raises:
      ValueError, TypeError, NameError: at trace time, for arguments that do not fit: groups that do
        not divide the channels, axes, leaves, dtypes, a mask, an axis name that is not in scope,
        statistics over one value in training.

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
    """Returns the axis that statistics grow along, if there is one; raises for other axes."""
    if given is None:
        return set()
    found = _checks.axes("group_norm", "cumulative_axis", given, shape)
    if len(found) != 1 or found == (channel,) or not set(found) <= set(axes):
        _checks.raise_error(
            "group_norm",
            "the statistics cannot grow along this axis",
            expected=f"one of the reduced axes {axes} but that of the channels, {channel}",
            got=f"cumulative_axis={given!r} for x.shape={shape}",
            fix="Name the axis of time, as in cumulative_axis=1 for (batch, time, channels)",
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
            "the statistics of a group are over its channels, too",
            expected=f"reduction_axes with the feature axis, {channel}",
            got=f"reduction_axes={axes} for x.shape={shape}",
            fix="Add it, or use instance_norm",
        )
