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
    """Makes the learned epsilon. A closure, as JAX's `constant(1e-4)`, cannot be pickled."""
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
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      use_threshold: whether there is the threshold of the thresholded linear unit, the layer's
        own activation.
      learn_epsilon: whether each feature learns an epsilon. The paper asks for it if a single value
        is reduced, as in 1x1 feature maps and fully connected layers.
      scale_init: makes the scale.
      scale_offset: what the layer adds to the scale. `ones`, the default of `scale_init`, then
        makes `1 - scale_offset`.
      bias_init: makes the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of the leaves.

    Returns:
      `params`: a dict of `scale` (ones), `bias`, `threshold` (zeros) and, if learned, `epsilon`
        (1e-4), each `(*num_features)`; and an empty `batch_stats`.

    Raises:
      ValueError: for a size that is not positive. TypeError: for an integer `param_dtype`, or a
        random initializer without a key.

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
    r"""Divides each channel of each example by its root mean square; a learned threshold follows.

    .. math:: y = \max\left((o + \gamma) \frac{x}{\sqrt{\nu^2 + \epsilon + |\epsilon_l|}} + \beta,
              \tau\right), \qquad
              \nu^2 = \frac1n \sum_i x_i^2

    with the mean square over the positions of one channel of one example. It reaches batch norm's
    accuracy without depending on the batch: use it in convolutional networks at any batch size, in
    place of normalization *and* activation.

    Args:
      params: dict of `scale`, `bias`, `threshold` (tau; without it there is no maximum) and
        `epsilon` (a learned epsilon), each `(*features)`, or `(*leading, *features)` for one of
        each example. Leading sizes must match the first non-feature axes of x. Missing leaves are
        left out.
      batch_stats: `{}`.
      x: floating-point, examples along axis 0, such as `(batch, height, width, channels)`.
      train: Python bool.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      reduction_axes: the axes that the mean square is taken over; by default all but axis 0 and the
        features.
      feature_axes: the axes that statistics and leaves run along; leaves have their sizes in
        ascending order.
      epsilon: added to the mean square. The paper's 1e-6 has no effect if there are several values
        to average. With a single value, y would be the sign of x, and a learned epsilon helps.
      mask: bool, broadcastable to x: True where an element counts; or real and not negative: the
        weight of each element. Elements that do not count do not affect the statistics; if one is
        NaN or infinite, y is as for x = 0 there, a constant. If nothing counts, the mean square is
        1.
      axis_name: mapped axis or axes that `reduction_axes` are sharded over: statistics are shared
        over them.
      axis_index_groups: groups of indices of that axis that share statistics, as in `jax.lax.psum`.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, of x's shape, and `{}`. Computed in at least float32 and rounded once. y and its
      gradients are right for x up to 1e25.

    Raises:
      ValueError, TypeError, NameError: at trace time, for arguments that do not fit: a reduction
        over axis 0 or over features, axes, leaves, dtypes, a mask, an axis name that is not in
        scope, complex x with a threshold.

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
            "complex numbers have no maximum",
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
