"""Weight normalization (Salimans & Kingma, 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Activations, Axes, BatchStats, DTypeLike, Kernel, Params, widen
from normjax.layers.affine import lay_out, scale_and_shift
from normjax.layers.jit_step import jit_step
from normjax.layers.operands import check_operands, check_spec
from normjax.statistics.elements import abs2
from normjax.statistics.moments import moments
from normjax.statistics.spec import Spec


@with_foreign_names
def weight_norm_init(
    kernel: Kernel,
    *,
    feature_axes: Axes = -1,
    epsilon: float = 1e-12,
    param_dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    r"""Returns the scale for which `weight_norm` returns the kernel unchanged, and `{}`.

    .. math:: \gamma = \sqrt{\lVert v \rVert^2 + \epsilon}

    Since the scale includes epsilon, kernels with norms below 1e-3 are also unchanged.

    Args:
      kernel: of any rank >= 1, such as `(inputs, features)` or `(height, width, inputs, features)`.
      feature_axes: the axes along which each slice has its own norm; `()` for one norm of the whole
        kernel.
      epsilon: the epsilon to be passed to `weight_norm`.
      param_dtype: dtype of the scale; None for the dtype of the kernel.

    Returns:
      `params`: a dict of `scale`, the norms of the kernel, `(*features)`; and an empty
        `batch_stats`.

    Raises:
      ValueError, TypeError: for axes or dtypes that do not fit.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.weights.weight_norm_init(jnp.array([[3.0], [4.0]]))
      >>> print(params["scale"], batch_stats)
      [5.] {}
    """
    if _foreign:
        raise_for_foreign(weight_norm_init, _foreign)
    kernel = _checks.activations("weight_norm_init", kernel, "kernel")
    kept = _checks.axes("weight_norm_init", "feature_axes", feature_axes, kernel.shape)
    epsilon = _checks.number("weight_norm_init", "epsilon", epsilon, 0.0, math.inf)
    axes = _checks.other_axes(kept, kernel.ndim)
    norm = jnp.sqrt(jnp.sum(abs2(widen(kernel)), axes) + epsilon)
    return {"scale": norm.astype(kernel.dtype if param_dtype is None else param_dtype)}, {}


@jax.named_scope("weight_norm")
@with_foreign_names
def weight_norm(
    params: Params,
    batch_stats: BatchStats,
    kernel: Kernel,
    train: bool,
    *,
    feature_axes: Axes = -1,
    epsilon: float = 1e-12,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Kernel, BatchStats]:
    r"""Rescales a kernel so that the norms of its features are `scale`.

    .. math:: w = \gamma \frac{v}{\sqrt{\lVert v \rVert^2 + \epsilon}}

    with the norm over all axes except the feature axes. The length and the direction of each
    feature's weights are then learned separately, without statistics of activations. Use it in
    recurrent and generative networks, and in reinforcement learning.

    Args:
      params: dict of `scale`, `(*features)`. If it is missing, all norms are 1.
      batch_stats: `{}`.
      kernel: v, floating-point or complex, of any rank >= 1. It is not changed.
      train: Python bool. Training and inference compute the same values.
      feature_axes: the axes along which each slice has its own norm; `()` for one norm of the whole
        kernel.
      epsilon: added to the squared norm.
      dtype: dtype of w; None for the dtype of the kernel.

    Returns:
      `w`, with the shape of the kernel, and `{}`. w is computed in at least float32 and rounded
      once.

    Raises:
      ValueError, TypeError: at trace time, for axes, leaves or dtypes that do not fit.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> kernel = jnp.array([[3.0, 1.0], [4.0, 0.0]])
      >>> params = {"scale": jnp.array([1.0, 2.0])}
      >>> print(nj.weights.weight_norm(params, {}, kernel, train=True)[0].round(3))
      [[0.6 2. ]
       [0.8 0. ]]

    References:
      Salimans & Kingma, "Weight Normalization" (NeurIPS 2016), eq. 2.
    """
    if _foreign:
        raise_for_foreign(weight_norm, _foreign)
    function = "weight_norm"
    operands = check_operands(
        function,
        params,
        batch_stats,
        kernel,
        train,
        feature_axes=feature_axes,
        dtype=dtype,
        leaves=("scale",),
        name="kernel",
    )
    axes = _checks.other_axes(operands.feature_axes, operands.x.ndim)
    spec = check_spec(function, operands, axes, epsilon)
    return _weight_norm(operands.params, operands.x, spec), batch_stats


@partial(jit_step, like="kernel")
def _weight_norm(params: Params, kernel: Array, spec: Spec) -> Array:
    params = lay_out(params, kernel.ndim, spec)
    kernel = widen(kernel)
    square = jnp.sum(abs2(kernel), spec.axes, keepdims=True)
    direction = kernel * lax.rsqrt(square + spec.epsilon).astype(kernel.dtype)
    return scale_and_shift(direction, params).astype(spec.dtype)


@with_foreign_names
def weight_norm_init_from_data(
    linear: Callable[[Kernel], Activations],
    kernel: Kernel,
    *,
    feature_axes: Axes = -1,
    output_axes: Axes = -1,
    epsilon: float = 1e-5,
    **_foreign: Never,
) -> tuple[Params, BatchStats, Array]:
    r"""Returns a scale and a bias that normalize a first batch to mean 0 and variance 1.

    .. math:: t = \mathrm{linear}\left(\frac{v}{\lVert v \rVert}\right), \qquad
              \gamma = \frac{1}{\sqrt{\sigma^2[t] + \epsilon}}, \qquad \beta = - \gamma \mu[t]

    Args:
      linear: a function from a kernel to the pre-activations of a batch, without bias, such as
        `lambda kernel: x @ kernel`.
      kernel: v.
      feature_axes: the feature axes of the kernel.
      output_axes: the axes of these features in the result of `linear`.
      epsilon: added to the variance.

    Returns:
      `params` and `batch_stats` for `weight_norm`, and the bias to add to the result of `linear`,
      `(*features)`.

    Raises:
      ValueError, TypeError: for axes that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x, kernel = 3 + 2 * jax.random.normal(jax.random.key(0), (100, 4)), jnp.ones((4, 1))
      >>> params, _, bias = nj.weights.weight_norm_init_from_data(lambda kernel: x @ kernel, kernel)
      >>> y = x @ nj.weights.weight_norm(params, {}, kernel, train=True)[0] + bias
      >>> print(abs(y.mean().round(3)), y.std().round(3))
      0.0 1.0

    References:
      Salimans & Kingma (2016), section 3, eq. 5 and 6.
    """
    if _foreign:
        raise_for_foreign(weight_norm_init_from_data, _foreign)
    function = "weight_norm_init_from_data"
    directions, batch_stats = weight_norm({}, {}, kernel, train=True, feature_axes=feature_axes)
    outputs = _checks.activations(function, linear(directions))
    kept = _checks.axes(function, "output_axes", output_axes, outputs.shape)
    _, mean, var = moments(outputs, _checks.other_axes(kept, outputs.ndim))
    scale = lax.rsqrt(var + epsilon)
    return (
        {"scale": scale.astype(directions.dtype)},
        batch_stats,
        (-mean * scale).astype(outputs.dtype),
    )
