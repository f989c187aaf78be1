"""Dynamic tanh (Zhu, Chen, He, LeCun & Liu, 2025): a transformer without normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Never

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jaxtyping import Array

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Activations, Axes, BatchStats, DTypeLike, Initializer, Params, PRNGKey
from normjax.layers.affine import init_params, lay_out, scale_and_shift
from normjax.layers.jit_step import jit_step
from normjax.layers.operands import check_operands
from normjax.statistics.elements import read
from normjax.statistics.spec import Spec


def half(key: PRNGKey | None, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initializes the slope of the Flax modules; unlike `constant(0.5)`, it can be pickled."""
    return jnp.full(shape, 0.5, dtype)


@with_foreign_names
def dynamic_tanh_init(
    num_features: int | Sequence[int],
    *,
    alpha: float = 0.5,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = ones,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters that `dynamic_tanh` starts from, and `{}`: no running statistics.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      alpha: initial value of the learnable slope. 0.5 suits all models except large language
        models. For these, use smaller values the wider the model is, and larger ones before
        attention than elsewhere (0.2 to 1.0; section 7.2 of the paper).
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias.
      scale_init: initializer of the scale.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `1 - scale_offset`, so that the effective scale starts at 1.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of the leaves.

    Returns:
      `params`: a dict of `alpha` (a scalar), `scale` (ones) and `bias` (zeros), each
        `(*num_features)`; and an empty `batch_stats`.

    Raises:
      ValueError: if a size is not positive, or alpha is not finite. TypeError: if `param_dtype` is
        an integer type, or a random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> params, batch_stats = nj.dynamic_tanh_init(2)
      >>> print(params["alpha"], params["scale"], params["bias"])
      0.5 [1. 1.] [0. 0.]
    """
    if _foreign:
        raise_for_foreign(dynamic_tanh_init, _foreign)
    _checks.between("dynamic_tanh_init", "alpha", alpha, -math.inf, math.inf)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    params = init_params("dynamic_tanh_init", num_features, makers, key, param_dtype, scale_offset)
    return {"alpha": jnp.array(alpha, jnp.finfo(param_dtype).dtype)} | params, {}


@jax.named_scope("dynamic_tanh")
@with_foreign_names
def dynamic_tanh(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    feature_axes: Axes = -1,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Applies a tanh with a learnable slope to each element, in place of layer norm.

    .. math:: y = (o + \gamma) \tanh(\alpha x) + \beta

    Use it in place of layer norm or RMS norm in transformers. The tanh bounds outliers, as layer
    norm does. There are no reductions: each element of y depends on one element of x.

    Args:
      params: dict of `alpha` (a scalar), `scale` and `bias`, each `(*features)`, or `(*leading,
        *features)` for a scale and bias per example. Leading dimensions must match the first
        non-feature axes of x. A missing scale or bias is skipped.
      batch_stats: `{}`.
      x: floating-point or complex, any rank >= 1.
      train: Python bool. Training and inference compute the same values.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      feature_axes: the axes along which scale and bias vary. A leaf has the sizes of these axes in
        ascending order.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and `{}`. y is computed in at least float32 and rounded once.

    Raises:
      ValueError, TypeError: at trace time, for an invalid argument: wrong axes, leaves or dtypes,
        or a traced `train`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.dynamic_tanh_init(2)
      >>> x = jnp.array([[1.0, -100.0]])
      >>> print(nj.dynamic_tanh(params, batch_stats, x, train=True)[0].round(3))
      [[ 0.462 -1.   ]]

    References:
      Zhu, Chen, He, LeCun & Liu, "Transformers without Normalization" (CVPR 2025), eq. 3 and
      Algorithm 1.
    """
    if _foreign:
        raise_for_foreign(dynamic_tanh, _foreign)
    operands = check_operands(
        "dynamic_tanh",
        params,
        batch_stats,
        x,
        train,
        feature_axes=feature_axes,
        dtype=dtype,
        leaves=("scale", "bias"),
        required=("alpha",),
    )
    offset = _checks.number("dynamic_tanh", "scale_offset", scale_offset, -math.inf, math.inf)
    spec = Spec(
        axes=(), feature_axes=operands.feature_axes, dtype=operands.dtype, scale_offset=offset
    )
    return _dynamic_tanh(operands.params, operands.x, spec), batch_stats


@jit_step
def _dynamic_tanh(params: Params, x: Array, spec: Spec) -> Array:
    params = lay_out(params, x.ndim, spec)
    x32 = read(x).x32
    squashed = jnp.tanh(params["alpha"].astype(x32.dtype) * x32)
    return scale_and_shift(squashed, params).astype(spec.dtype)
