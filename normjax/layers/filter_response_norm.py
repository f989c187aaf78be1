"""Filter response normalization with its thresholded linear unit (Singh & Krishnan, 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import Array

from normjax import _checks
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
from normjax.statistics.per_example import mean_square
from normjax.statistics.reduction import Spec, read


def small(key: PRNGKey | None, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Makes the learned epsilon. A closure, as JAX's `constant(1e-4)`, cannot be pickled."""
    return jnp.full(shape, 1e-4, dtype)


def filter_response_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    use_threshold: bool = True,
    learn_epsilon: bool = False,
    scale_init: Initializer = ones,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
) -> tuple[Params, BatchStats]:
    """Returns the parameters that `filter_response_norm` starts from, and `{}`: it has no running statistics.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      use_threshold: whether the thresholded linear unit is there, the activation that belongs to
        the layer.
      learn_epsilon: whether each feature learns an epsilon, which the paper asks for where one
        value is reduced, as in 1x1 feature maps and fully connected layers.
      scale_init: makes the scale.
      bias_init: makes the bias.
      key: for a random initializer; not needed otherwise.
      param_dtype: of the leaves.

    Returns:
      `params`: a dict of `scale` (ones), `bias`, `threshold` (zeros) and, if learned, `epsilon`
        (1e-4), each
      `(*num_features)`; and an empty `batch_stats`.

    Raises:
      ValueError: for a size that is not positive. TypeError: for an integer `param_dtype`, or a
        random initializer without a key.

    Example:
      >>> import normjax as nj
      >>> print(nj.filter_response_norm_init(2)[0]["threshold"])
      [0. 0.]
    """
    makers = {
        "scale": (use_scale, scale_init),
        "bias": (use_bias, bias_init),
        "threshold": (use_threshold, zeros),
        "epsilon": (learn_epsilon, small),
    }
    return init_params("filter_response_norm_init", num_features, makers, key, param_dtype), {}


@jax.named_scope("filter_response_norm")
def filter_response_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Activations, BatchStats]:
    r"""Divides each channel of each example by its root mean square, and cuts off below a learned threshold.

    .. math:: y = \max\left(\gamma \frac{x}{\sqrt{\nu^2 + \epsilon + |\epsilon_l|}} + \beta, \tau\right), \qquad
              \nu^2 = \frac1n \sum_i x_i^2

    with the mean square over the positions of one channel of one example. Batch norm's accuracy
    without a batch: use it in convolutional networks at any batch size, in place of normalization
      *and* activation.

    Args:
      params: dict of `scale`, `bias`, `threshold` (tau; without it there is no maximum) and
        `epsilon` (a learned epsilon), each `(*features)`, or `(*leading, *features)` for one of
        each example, where leading sizes are those of the first axes of x that are no features; an
        absent leaf is left out.
      batch_stats: `{}`.
      x: floating-point, examples along axis 0, such as `(batch, height, width, channels)`.
      train: Python bool.
      reduction_axes: the axes that the mean square is taken over; by default all but axis 0 and the
        features.
      feature_axes: the axes that have statistics and leaves of their own, in ascending order.
      epsilon: added to the mean square. The paper's 1e-6 is small enough to be of no account where
        there is something to average over; where there is not, y would be the sign of x, and a
        learned epsilon helps.
      mask: bool, broadcastable to x: True where an element counts. What does not count leaves no
        trace in the statistics; where it is NaN or infinite, y is that of x = 0, a constant. Where
        nothing counts, the mean square is 1.
      axis_name: mapped axis or axes that `reduction_axes` are sharded over: statistics are shared
        over them.
      axis_index_groups: groups of indices of that axis that share, as in `jax.lax.psum`.
      dtype: of y; None for that of x.

    Returns:
      `y`, of x's shape, and `{}`. Computed in at least float32 and rounded once.

    Raises:
      ValueError, TypeError, NameError: at trace time, for whatever does not fit: a reduction over
        axis 0 or over features, axes, leaves, dtypes, a mask, an axis name that is not in scope,
        complex x with a threshold.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.filter_response_norm_init(1)
      >>> x = jnp.array([[[2.0], [-2.0]]])
      >>> print(nj.filter_response_norm(params, batch_stats, x, train=True)[0].round(3).ravel())
      [1. 0.]

    References:
      Singh & Krishnan, "Filter Response Normalization Layer" (CVPR 2020), eq. 1-3 and section 3.1.
    """
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
            "complex numbers have no maximum",
            expected="a real x",
            got=f"x.dtype={operands.x.dtype} and a threshold for x.shape={operands.x.shape}",
            fix="Leave the threshold out: filter_response_norm_init(..., use_threshold=False)",
            kind=TypeError,
        )
    spec = check_spec(function, operands, operands.axes, epsilon, axis_name, axis_index_groups)
    return _filter_response_norm(operands.params, operands.x, operands.mask, spec), batch_stats


@jit_step_within_examples
def _filter_response_norm(params: Params, x: Array, mask: Array | None, spec: Spec) -> Array:
    inputs = read(x, mask)
    count, square = mean_square(spec, inputs, mask)
    if mask is not None:
        square = jnp.where(count > 0, square, 1)
    epsilon = spec.epsilon
    if "epsilon" in params:
        epsilon += jnp.abs(widen(params["epsilon"]))
    affine = {leaf: params[leaf] for leaf in ("scale", "bias") if leaf in params}
    y = normalize(inputs, None, spec.expand(square), affine, epsilon)
    if "threshold" in params:
        y = jnp.maximum(y, params["threshold"].astype(y.dtype))
    return y.astype(spec.dtype)
