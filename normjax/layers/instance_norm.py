"""Instance normalization (Ulyanov, Vedaldi & Lempitsky, 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros

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
    axes_within_examples,
    check_operands,
    check_spec,
    more_than_one_value,
)
from normjax.layers.standardize import StandardizeSpec, standardize


@with_foreign_names
def instance_norm_init(
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
    """Returns the parameters that `instance_norm` starts from, and `{}`: no running statistics.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias.
      scale_init: initializer of the scale.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias.

    Returns:
      `params`: a dict of `scale` (ones) and `bias` (zeros), each `(*num_features)`; and an empty
        `batch_stats`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> print(nj.instance_norm_init(2)[0]["bias"])
      [0. 0.]
    """
    if _foreign:
        raise_for_foreign(instance_norm_init, _foreign)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    return init_params(
        "instance_norm_init", num_features, makers, key, param_dtype, scale_offset
    ), {}


@jax.named_scope("instance_norm")
@with_foreign_names
def instance_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    epsilon: float = 1e-5,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Normalizes each channel of each example by its own mean and variance.

    .. math:: y = (o + \gamma) \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with the statistics over the positions (height and width) of one channel of one example. It
    removes the contrast and colour of each image: use it in style transfer and image generation. If
    scale and bias come from another image, it is adaptive instance norm.

    Args:
      params: dict of `scale` and `bias`, each `(*features)`, or `(*leading, *features)` for a scale
        and bias per example. Leading dimensions must match the first non-feature axes of x. Missing
        leaves are skipped.
      batch_stats: `{}`.
      x: floating-point or complex, with examples along axis 0, such as `(batch, height, width,
        channels)`.
      train: Python bool. Training and inference compute the same values.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      reduction_axes: the axes over which the mean and variance are computed; by default all but
        axis 0 and the feature axes.
      feature_axes: the axes along which statistics, scale and bias vary. A leaf has the sizes of
        these axes in ascending order.
      epsilon: added to the variance.
      mask: bool, broadcastable to x, True for elements that count; or non-negative weights, one per
        element. Elements that do not count do not affect the statistics. If one of them is NaN or
        infinite, its y is the bias, which derivatives treat as a constant. If no element counts,
        the mean is 0 and the variance is 1.
      axis_name: mapped axis or axes over which `reduction_axes` are sharded. Statistics are
        all-reduced over them.
      axis_index_groups: groups of indices of that axis; each group shares statistics, as in
        `jax.lax.psum`.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and `{}`. Statistics and y are computed in at least float32, and y
      is rounded once. The variance stays accurate if x is far from zero. y and its gradients are
      accurate for x up to 1e25.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an invalid argument: a reduction over
        axis 0 or over a feature axis, wrong axes, leaves, dtypes or masks, an axis name that is not
        in scope, or statistics over a single value in training.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.instance_norm_init(2)
      >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
      >>> print(nj.instance_norm(params, batch_stats, x, train=True)[0].round(3))
      [[[-1. -1.]
        [ 1.  1.]]]

    References:
      Ulyanov, Vedaldi & Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
      Stylization" (2016), eq. 3. Huang & Belongie, "Arbitrary Style Transfer in Real-time with
      Adaptive Instance Normalization" (2017), eq. 8.
    """
    if _foreign:
        raise_for_foreign(instance_norm, _foreign)
    function = "instance_norm"
    operands = check_operands(
        function,
        params,
        batch_stats,
        x,
        train,
        feature_axes=feature_axes,
        mask=mask,
        dtype=dtype,
        find_axes=partial(axes_within_examples, function, reduction_axes),
    )
    spec = check_spec(
        function,
        operands,
        operands.axes,
        epsilon,
        axis_name,
        axis_index_groups,
        StandardizeSpec,
        scale_offset=scale_offset,
    )
    if train:
        more_than_one_value(function, operands.x, spec)
    return standardize(operands.params, operands.x, operands.mask, spec), batch_stats
