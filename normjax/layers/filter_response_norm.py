"""Filter response normalization with its thresholded linear unit (Singh & Krishnan, 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import Array

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
    widen,
)
from normjax.layers.affine import init_params, normalize
from normjax.layers.jit_step import jit_step_within_examples
from normjax.layers.operands import axes_within_examples, check_operands, check_spec
from normjax.statistics.elements import read
from normjax.statistics.per_example import ExampleSpec, mean_square


def small(key: PRNGKey | None, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initializes the learnable epsilon; unlike `constant(1e-4)`, it can be pickled."""
    return jnp.full(shape, 1e-4, dtype)


@with_foreign_names
def filter_response_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    use_threshold: bool = True,
    learn_epsilon: bool = False,
    scale_init: Initializer = ones,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters that `filter_response_norm` starts from, and `{}`.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias.
      use_threshold: whether to use the learnable threshold of the thresholded linear unit, the
        activation that belongs to the layer.
      learn_epsilon: whether each feature learns an epsilon. The paper recommends it if each mean
        square is over a single value, as in 1x1 feature maps and fully connected layers.
      scale_init: initializer of the scale.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of the leaves.

    Returns:
      `params`: a dict of `scale` (ones), `bias`, `threshold` (zeros) and, with `learn_epsilon`,
        `epsilon` (1e-4), each `(*num_features)`; and an empty `batch_stats`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> print(nj.filter_response_norm_init(2)[0]["threshold"])
      [0. 0.]
    """
    if _foreign:
        raise_for_foreign(filter_response_norm_init, _foreign)
    makers = {
        "scale": (use_scale, scale_init),
        "bias": (use_bias, bias_init),
        "threshold": (use_threshold, zeros),
        "epsilon": (learn_epsilon, small),
    }
    return init_params(
        "filter_response_norm_init", num_features, makers, key, param_dtype, scale_offset
    ), {}


@jax.named_scope("filter_response_norm")
@with_foreign_names
def filter_response_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Divides each channel of each example by its root mean square, and applies a threshold.

    .. math:: y = \max\left((o + \gamma) \frac{x}{\sqrt{\nu^2 + \epsilon + |\epsilon_l|}} + \beta,
              \tau\right), \qquad
              \nu^2 = \frac1n \sum_i x_i^2

    with the mean square over the positions of one channel of one example. It reaches the accuracy
    of batch norm without depending on the batch. Use it in convolutional networks of any batch
    size, in place of both the normalization and the activation.

    Args:
      params: dict of `scale`, `bias`, `threshold` (tau; without it, no maximum is taken) and
        `epsilon` (a learnable epsilon), each `(*features)`, or `(*leading, *features)` for a scale
        and bias per example. Leading dimensions must match the first non-feature axes of x. Missing
        leaves are skipped.
      batch_stats: `{}`.
      x: floating-point, with examples along axis 0, such as `(batch, height, width, channels)`.
      train: Python bool. Training and inference compute the same values.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      reduction_axes: the axes over which the mean square is computed; by default all but axis 0 and
        the feature axes.
      feature_axes: the axes along which statistics and leaves vary. A leaf has the sizes of these
        axes in ascending order.
      epsilon: added to the mean square. The paper's 1e-6 has hardly any effect if several values
        are averaged. With a single value, y would be the sign of x; use a learnable epsilon then.
      mask: bool, broadcastable to x, True for elements that count; or non-negative weights, one per
        element. Elements that do not count do not affect the statistics. If one of them is NaN or
        infinite, its y is the value for x = 0, which derivatives treat as a constant. If no element
        counts, the mean square is 1.
      axis_name: mapped axis or axes over which `reduction_axes` are sharded. Statistics are
        all-reduced over them.
      axis_index_groups: groups of indices of that axis; each group shares statistics, as in
        `jax.lax.psum`.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and `{}`. y is computed in at least float32 and rounded once. y and
      its gradients are accurate for x up to 1e25.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an invalid argument: a reduction over
        axis 0 or over a feature axis, wrong axes, leaves, dtypes or masks, an axis name that is not
        in scope, or complex x with a threshold.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.filter_response_norm_init(1)
      >>> x = jnp.array([[[2.0], [-2.0]]])
      >>> print(nj.filter_response_norm(params, batch_stats, x, train=True)[0].round(3).ravel())
      [1. 0.]

    References:
      Singh & Krishnan, "Filter Response Normalization Layer" (CVPR 2020), eq. 1-3 and section 3.1.
    """
    if _foreign:
        raise_for_foreign(filter_response_norm, _foreign)
    function = "filter_response_norm"
    leaves = ("scale", "bias", "threshold", "epsilon")
    operands = check_operands(
        function,
        params,
        batch_stats,
        x,
        train,
        feature_axes=feature_axes,
        mask=mask,
        dtype=dtype,
        leaves=leaves,
        find_axes=partial(axes_within_examples, function, reduction_axes),
    )
    if "threshold" in params and jnp.iscomplexobj(operands.x):
        _checks.raise_error(
            function,
            "the threshold takes a maximum, and complex numbers have none",
            expected="a real x",
            got=f"x.dtype={operands.x.dtype} and a threshold for x.shape={operands.x.shape}",
            fix="Leave the threshold out: filter_response_norm_init(..., use_threshold=False)",
            kind=TypeError,
        )
    spec = check_spec(
        function,
        operands,
        operands.axes,
        epsilon,
        axis_name,
        axis_index_groups,
        scale_offset=scale_offset,
    )
    return _filter_response_norm(operands.params, operands.x, operands.mask, spec), batch_stats


@jit_step_within_examples
def _filter_response_norm(params: Params, x: Array, mask: Array | None, spec: ExampleSpec) -> Array:
    inputs = read(x, mask)
    count, square = mean_square(spec, inputs, mask)
    if mask is not None:
        square = jnp.where(count > 0, square, spec.unit(x) ** 2)
    epsilon = spec.epsilon
    if "epsilon" in params:
        epsilon += jnp.abs(widen(params["epsilon"]))
    affine = {leaf: params[leaf] for leaf in ("scale", "bias") if leaf in params}
    y = normalize(inputs, None, spec.expand(square), affine, epsilon, spec.unit(x))
    if "threshold" in params:
        y = jnp.maximum(y, params["threshold"].astype(y.dtype))
    return y.astype(spec.dtype)
