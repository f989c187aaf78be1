"""Computes effective learning rates, and the rotation of kernels in equilibrium."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from normjax import _checks
from normjax._trees import check_arrays, plain
from normjax._typing import Axes
from normjax.optim.directions import norm, reduced_axes

Optimizer = Literal["sgd", "adam"]
OPTIMIZERS = ("sgd", "adam")


def effective_learning_rate(
    params: PyTree[Array],
    learning_rate: ArrayLike,
    *,
    feature_axes: Axes = (),
    optimizer: Optimizer = "sgd",
) -> PyTree[Array]:
    r"""Returns the learning rate that acts on the direction of each parameter.

    .. math:: \eta_{\mathrm{sgd}} = \frac{\eta}{\lVert w \rVert^2}, \qquad
              \eta_{\mathrm{adam}} = \frac{\eta}{\lVert w \rVert}

    If a network is invariant to the scale of w, its gradient shrinks as w grows, `grad f(c w) =
    grad f(w) / c`, and a step rotates w by an angle of the step length divided by the norm of w. So
    the direction of w is trained as if w had norm 1 and this learning rate. Steps of Adam, RMSprop
    and Lion do not depend on the size of the gradient, so only the second effect remains. The rate
    is meaningful only for parameters that `scale_invariant` finds.

    Args:
      params: any tree of arrays, or an nnx module.
      learning_rate: a number or a scalar array.
      feature_axes: the axes along which each slice has its own norm, such as -1 for output channels
        before batch norm; `()` for one norm of the whole array.
      optimizer: "sgd" (with or without momentum), or "adam" (also for other optimizers that
        normalize their steps).

    Returns:
      A tree with the structure of `params` (and arrays instead of nnx variables): for each leaf the
      rates `(*features)`, in at least float32; infinite for a norm of 0.

    Raises:
      ValueError: if a leaf does not have the feature axes, with its path; if `optimizer` is
        unknown.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> print(nj.optim.effective_learning_rate({"kernel": jnp.array([[3.0], [4.0]])}, 0.1))
      {'kernel': Array(0.004, dtype=float32)}

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
    """
    function = "effective_learning_rate"
    _checks.choice(function, "optimizer", optimizer, OPTIMIZERS)
    arrays = plain(params)
    check_arrays(function, "params", arrays)
    power = 2 if optimizer == "sgd" else 1

    def rate(path: tuple, leaf: Array) -> Array:
        axes = reduced_axes(function, feature_axes, leaf, path)
        length = norm(leaf, axes).squeeze(axes)
        return jnp.asarray(learning_rate, length.dtype) / length**power

    return jax.tree_util.tree_map_with_path(rate, jax.tree.map(jnp.asarray, arrays))


def rotational_equilibrium(
    learning_rate: ArrayLike,
    weight_decay: ArrayLike,
    *,
    momentum: ArrayLike = 0.0,
    optimizer: Optimizer = "sgd",
) -> ArrayLike:
    r"""Returns the angle by which kernels rotate in each step, in equilibrium with weight decay.

    .. math:: \hat\eta_{\mathrm{sgd}} = \sqrt{\frac{2 \eta \lambda}{1 + \alpha}}, \qquad
              \hat\eta_{\mathrm{adam}} = \sqrt{2 \eta \lambda \frac{1 - \beta_1}{1 + \beta_1}}

    Gradients are orthogonal to a scale-invariant kernel, so they increase its norm, and weight
    decay decreases it. Once both balance, the angle depends neither on the gradients nor on the
    architecture. Pass it as the `rotation` of `renormalize`.

    Args:
      learning_rate: the learning rate, a number or an array.
      weight_decay: the weight decay; for "sgd" it is added to the gradient, times the kernel; for
        "adam" it is decoupled (AdamW).
      momentum: alpha of SGD as in `optax.sgd`, or beta1 of Adam.
      optimizer: "sgd" or "adam".

    Returns:
      The root mean square angle per step, in radians.

    Raises:
      ValueError: if `optimizer` is unknown.

    Example:
      >>> import normjax as nj
      >>> angle = nj.optim.rotational_equilibrium(1e-3, 0.1, momentum=0.9, optimizer="adam")
      >>> print(round(angle, 5))
      0.00324

    References:
      Kosson, Messmer & Jaggi, "Rotational Equilibrium: How Weight Decay Balances Learning Across
      Neural Networks" (ICML 2024), Table 1.
    """
    _checks.choice("rotational_equilibrium", "optimizer", optimizer, OPTIMIZERS)
    share = 1 / (1 + momentum) if optimizer == "sgd" else (1 - momentum) / (1 + momentum)
    squared = 2 * learning_rate * weight_decay * share
    return math.sqrt(squared) if isinstance(squared, (int, float)) else jnp.sqrt(squared)
