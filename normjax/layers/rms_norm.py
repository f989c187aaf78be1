"""Root mean square normalization (Zhang & Sennrich, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
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
)
from normjax.layers.affine import init_params, normalize
from normjax.layers.by_example import has_one_derivative, normalize_by_own
from normjax.layers.jit_step import jit_step_within_examples
from normjax.layers.operands import check_operands, check_spec
from normjax.statistics.elements import read
from normjax.statistics.per_example import ExampleSpec, mean_square


@with_foreign_names
def rms_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = False,
    scale_init: Initializer = ones,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters that `rms_norm` starts from, and `{}`: it has no running statistics.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias; the paper has none.
      scale_init: initializer of the scale.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias.

    Returns:
      `params`: a dict of `scale` (ones), `(*num_features)`, and maybe `bias` (zeros); and an empty
        `batch_stats`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> print(nj.rms_norm_init(3)[0]["scale"])
      [1. 1. 1.]
    """
    if _foreign:
        raise_for_foreign(rms_norm_init, _foreign)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    return init_params("rms_norm_init", num_features, makers, key, param_dtype, scale_offset), {}


@jax.named_scope("rms_norm")
@with_foreign_names
def rms_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float = 1e-5,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Divides each example by the root of the mean square of its own features.

    .. math:: y = (o + \gamma) \frac{x}{\sqrt{\frac1n \sum_i |x_i|^2 + \epsilon}} + \beta

    It is layer norm without the mean, so it has one reduction instead of two. Use it in large
    language models. The output does not depend on the scale of x, but it does depend on an offset
    of x.

    Args:
      params: dict of `scale` and maybe `bias`, each `(*features)`, or `(*leading, *features)` for a
        scale and bias per example. Leading dimensions must match the first non-feature axes of x.
        Missing leaves are skipped.
      batch_stats: `{}`.
      x: floating-point or complex, any rank >= 1, such as `(batch, time, features)`.
      train: Python bool. Training and inference compute the same values.
      scale_offset: o, added to the scale in at least float32. Use 1.0 for checkpoints that store
        `scale - 1` (Gemma). This form keeps digits that bfloat16 would lose near 1, and lets weight
        decay pull the scale towards 1. The offset has no effect without a scale.
      reduction_axes: the axes over which the mean square is computed.
      feature_axes: the axes along which scale and bias vary. A leaf has the sizes of these axes in
        ascending order.
      epsilon: added to the mean square.
      mask: bool, broadcastable to x, True for elements that count; or non-negative weights, one per
        element. Elements that do not count do not affect the statistics. If one of them is NaN or
        infinite, its y is the bias (or 0), which derivatives treat as a constant. If no element
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
      ValueError, TypeError, NameError: at trace time, for an invalid argument: wrong axes, leaves,
        dtypes or masks, an axis name that is not in scope, or a traced `train`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.rms_norm_init(2)
      >>> y, _ = nj.rms_norm(params, batch_stats, jnp.array([[1.0, 7.0]]), train=True)
      >>> print(y.round(1))
      [[0.2 1.4]]

    References:
      Zhang & Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019), eq. 4.
    """
    if _foreign:
        raise_for_foreign(rms_norm, _foreign)
    function = "rms_norm"
    operands = check_operands(
        function, params, batch_stats, x, train, feature_axes=feature_axes, mask=mask, dtype=dtype
    )
    axes = _checks.axes(function, "reduction_axes", reduction_axes, operands.x.shape)
    spec = check_spec(
        function, operands, axes, epsilon, axis_name, axis_index_groups, scale_offset=scale_offset
    )
    return _rms_norm(operands.params, operands.x, operands.mask, spec), batch_stats


@jit_step_within_examples
def _rms_norm(params: Params, x: Array, mask: Array | None, spec: ExampleSpec) -> Array:
    inputs = read(x, mask)
    if has_one_derivative(spec, mask):
        return normalize_by_own(spec, inputs, params, center=False).astype(spec.dtype)
    count, square = mean_square(spec, inputs, mask)
    if mask is not None:
        square = jnp.where(count > 0, square, spec.unit(x) ** 2)
    y = normalize(inputs, None, spec.expand(square), params, spec.epsilon, spec.unit(x))
    return y.astype(spec.dtype)
