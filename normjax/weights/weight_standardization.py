"""Weight standardization (Qiao et al., 2019), and its scaled form (Brock et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Never, get_args

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones

from normjax import _checks
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, BatchStats, DTypeLike, Initializer, Kernel, Params, PRNGKey
from normjax.layers.affine import init_params
from normjax.layers.operands import check_operands, check_spec, more_than_one_value
from normjax.layers.standardize import EpsilonTo, KernelSpec, standardize


@with_foreign_names
def weight_standardization_init(
    num_features: int | Sequence[int],
    *,
    scale_init: Initializer = ones,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns a learnable gain for `weight_standardization`; without a gain, pass `{}` instead.

    Args:
      num_features: the size of the kernel's feature axis; with several feature axes, their sizes in
        the order of the axes.
      scale_init: initializer of the gain.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of the gain.

    Returns:
      `params`: a dict of `scale` (ones), `(*num_features)`; and an empty `batch_stats`.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> print(nj.weights.weight_standardization_init(2)[0]["scale"])
      [1. 1.]
    """
    if _foreign:
        raise_for_foreign(weight_standardization_init, _foreign)
    makers = {"scale": (True, scale_init)}
    return init_params("weight_standardization_init", num_features, makers, key, param_dtype), {}


@jax.named_scope("weight_standardization")
@with_foreign_names
def weight_standardization(
    params: Params,
    batch_stats: BatchStats,
    kernel: Kernel,
    train: bool,
    *,
    feature_axes: Axes = -1,
    scaled: bool = False,
    epsilon: float = 1e-5,
    epsilon_to: EpsilonTo = "variance",
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Kernel, BatchStats]:
    r"""Standardizes the weights of each feature to mean 0 and variance 1, or 1 / fan-in.

    .. math:: w = \gamma \frac{v - \mu}{\sqrt{N \sigma^2 + \epsilon}}

    with the mean and the biased variance over all axes except the feature axes. N is 1, or the
    fan-in with `scaled=True`. Use the plain form together with group norm for small batches. The
    scaled form preserves the variance of activations; use it in networks without activation
    normalization (NF-ResNets). It needs a gain for the activation, such as `sqrt(2 / (1 - 1 / pi))`
    for ReLU, in `scale_init` or after the activation.

    Args:
      params: `{}`, or a dict of `scale`, `(*features)`.
      batch_stats: `{}`.
      kernel: v, floating-point or complex, of any rank >= 2, such as `(height, width, inputs,
        features)`. It is not changed.
      train: Python bool. Training and inference compute the same values.
      feature_axes: the axes along which each slice has its own statistics.
      scaled: whether the variance of the result is 1 / fan-in instead of 1.
      epsilon: added to the variance; with `scaled=True`, added to the variance times the fan-in,
        which is near 1 for common initializers.
      epsilon_to: what epsilon is added to: "variance" as in the papers, or "deviation" as in the
        code of BiT and ViT. Use "deviation" to reproduce their kernels of small variance: :math:`w
        = \gamma (v - \mu) / (\sqrt{N} \sigma + \epsilon)`.
      dtype: dtype of w; None for the dtype of the kernel.

    Returns:
      `w`, with the shape of the kernel, and `{}`. w is computed in at least float32 and rounded
      once.

    Raises:
      ValueError, TypeError: at trace time, for axes, leaves or dtypes that do not fit, and for
        statistics over one weight in training.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> kernel = jnp.array([[1.0], [3.0], [1.0], [3.0]])
      >>> w, _ = nj.weights.weight_standardization({}, {}, kernel, train=True)
      >>> print(w.round(3).ravel())
      [-1.  1. -1.  1.]
      >>> w, _ = nj.weights.weight_standardization({}, {}, kernel, train=True, scaled=True)
      >>> print(w.round(3).ravel())
      [-0.5  0.5 -0.5  0.5]

    References:
      Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
      Standardization" (2019), eq. 5-7. Brock, De & Smith, "Characterizing signal propagation to
      close the performance gap in unnormalized ResNets" (ICLR 2021), eq. 1.
    """
    if _foreign:
        raise_for_foreign(weight_standardization, _foreign)
    function = "weight_standardization"
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
    shape = operands.x.shape
    axes = _checks.other_axes(operands.feature_axes, len(shape))
    _checks.choice(function, "epsilon_to", epsilon_to, get_args(EpsilonTo))
    epsilon = _checks.number(function, "epsilon", epsilon, 0.0, math.inf)
    fan_in = math.prod(shape[axis] for axis in axes) if scaled else 1
    if not isinstance(fan_in, int):
        _checks.raise_error(
            function,
            "scaled=True needs a constant fan-in, and the kernel has a symbolic size",
            expected="sizes that are ints",
            got=f"kernel.shape={shape} and scaled=True",
            fix="Export the function for a kernel of one size",
        )
    fan_in = max(fan_in, 1)  # an empty kernel has 0
    # (v - mu) / sqrt(N var + epsilon) equals (v - mu) / sqrt(var + epsilon / N) / sqrt(N).
    share = fan_in if epsilon_to == "variance" else math.sqrt(fan_in)
    spec = check_spec(
        function,
        operands,
        axes,
        epsilon / share,
        make_spec=KernelSpec,
        gain=1 / math.sqrt(fan_in),
        epsilon_to=epsilon_to,
    )
    if train:
        more_than_one_value(function, operands.x, spec)
    return standardize(operands.params, operands.x, None, spec), batch_stats
