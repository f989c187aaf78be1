"""Local response normalization (Krizhevsky, Sutskever & Hinton, 2012)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import ones, zeros
from jaxtyping import Array

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Activations, Axes, BatchStats, DTypeLike, Initializer, Params, PRNGKey
from normjax.layers.affine import init_params, lay_out, scale_and_shift
from normjax.layers.jit_step import jit_step
from normjax.layers.operands import check_operands, one_feature_axis
from normjax.statistics.elements import abs2, read
from normjax.statistics.spec import Spec


@with_foreign_names
def local_response_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = False,
    use_bias: bool = False,
    scale_init: Initializer = ones,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters that `local_response_norm` starts from (by default none), and `{}`.

    Args:
      num_features: the number of channels.
      use_scale: whether there is a scale; the paper has none.
      use_bias: whether to use a learnable bias; the paper has none.
      scale_init: initializer of the scale.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias.

    Returns:
      `params`: a dict of `scale` and `bias`, if used, each `(num_features,)`; and an empty
        `batch_stats`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> nj.local_response_norm_init(96)
      ({}, {})
    """
    if _foreign:
        raise_for_foreign(local_response_norm_init, _foreign)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    return init_params(
        "local_response_norm_init", num_features, makers, key, param_dtype, scale_offset
    ), {}


@jax.named_scope("local_response_norm")
@with_foreign_names
def local_response_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    size: int = 5,
    alpha: float = 5e-4,
    beta: float = 0.75,
    k: float = 2.0,
    feature_axes: Axes = -1,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Divides each channel by a power of the mean square of its neighbouring channels.

    .. math:: y_c = x_c \Big/ \Big(k + \frac{\alpha}{n} \sum_{j = c - \lfloor n/2 \rfloor}
              ^{c + \lfloor (n-1)/2 \rfloor} |x_j|^2\Big)^{\beta}

    with zeros beyond the first and the last channel. Use it to reproduce AlexNet and networks of
    its time; later networks do not use it.

    Args:
      params: `{}`, or a dict of `scale` and `bias`, each `(channels,)`, or `(*leading, channels)`
        for a scale and bias per example. They are applied last.
      batch_stats: `{}`.
      x: floating-point or complex, such as `(batch, height, width, channels)`.
      train: Python bool. Training and inference compute the same values.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      size: n, the number of neighbouring channels in the mean, including the channel itself.
      alpha: factor of the mean square, as in PyTorch and ONNX. In the paper and TensorFlow, alpha
        is the factor of the sum, that is `alpha / size` here. The default is the paper's 1e-4 times
        its size of 5.
      beta: the exponent.
      k: added to alpha times the mean square.
      feature_axes: the axis of the channels.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and `{}`. y is computed in at least float32 and rounded once.

    Raises:
      ValueError, TypeError: at trace time, for an invalid argument: a size that is not a positive
        int, a k that is not positive, or wrong axes, leaves or dtypes.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = jnp.array([[1.0, 2.0, 3.0]])
      >>> settings = {"size": 3, "alpha": 3.0, "beta": 1.0, "k": 1.0}
      >>> print(nj.local_response_norm({}, {}, x, train=True, **settings)[0])
      [[0.16666667 0.13333334 0.21428573]]

    References:
      Krizhevsky, Sutskever & Hinton, "ImageNet Classification with Deep Convolutional Neural
      Networks" (NeurIPS 2012), section 3.3.
    """
    if _foreign:
        raise_for_foreign(local_response_norm, _foreign)
    function = "local_response_norm"
    operands = check_operands(
        function,
        params,
        batch_stats,
        x,
        train,
        feature_axes=feature_axes,
        dtype=dtype,
        find_axes=partial(one_feature_axis, function),
    )
    (channel,) = operands.feature_axes
    alpha = _checks.number(function, "alpha", alpha, 0.0, math.inf)
    beta = _checks.number(function, "beta", beta, 0.0, math.inf)
    k = _checks.number(function, "k", k, 0.0, math.inf)
    neighbours = _checks.positive_int(size)
    if neighbours is None or k == 0:
        _checks.raise_error(
            function,
            "size or k is not positive",
            expected="an int size of 1 or more, and a finite k above 0",
            got=f"size={size!r} and k={k!r} for x.shape={operands.x.shape}",
            fix="The paper has size=5 and k=2.0",
        )
    spec = LocalSpec(
        axes=(),
        feature_axes=operands.feature_axes,
        dtype=operands.dtype,
        scale_offset=_checks.number(function, "scale_offset", scale_offset, -math.inf, math.inf),
        channel=channel,
        size=neighbours,
        alpha=alpha,
        beta=beta,
        k=k,
    )
    return _local_response_norm(operands.params, operands.x, spec), batch_stats


@dataclass(frozen=True, kw_only=True)
class LocalSpec(Spec):
    """The static arguments of a step that reduces no axis."""

    channel: int
    size: int
    alpha: float
    beta: float
    k: float


@jit_step
def _local_response_norm(params: Params, x: Array, spec: LocalSpec) -> Array:
    params = lay_out(params, x.ndim, spec)
    x32 = read(x).x32
    scale = (spec.k + spec.alpha / spec.size * _energy_nearby(abs2(x32), spec)) ** -spec.beta
    return scale_and_shift(x32 * scale.astype(x32.dtype), params).astype(spec.dtype)


def _energy_nearby(energy: Array, spec: LocalSpec) -> Array:
    """Sums the squares over a window of channels around each channel."""
    ones, none = [1] * energy.ndim, [(0, 0)] * energy.ndim
    window, padding = list(ones), none
    window[spec.channel] = spec.size
    padding[spec.channel] = (spec.size // 2, (spec.size - 1) // 2)
    zero = np.zeros((), energy.dtype)
    return lax.reduce_window(energy, zero, lax.add, window, ones, padding)
