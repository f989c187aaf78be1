"""Measures how far a step of an optimizer turns each kernel, and how long kernels are."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from normjax import _checks
from normjax._trees import Mask, check_alike, check_arrays, path_names, plain, spread
from normjax._typing import Axes
from normjax.optim import effective_learning_rate
from normjax.optim.directions import inner, norm, reduced_axes, unit
from normjax.optim.effective import OPTIMIZERS, Optimizer

FUNCTION = "rotation"


class Rotation(NamedTuple):
    """A training step of a kernel. Each field has the shape of its features, in at least float32.

    Attributes:
      norm: the norm of the kernel before the step.
      gradient_norm: the norm of its gradient.
      cosine: the cosine of the angle between kernel and gradient: 0 if the network is invariant to
        the kernel's scale.
      chance: 1 / sqrt(dim), the root mean square cosine between random directions.
      angle: the angle by which the step turns the kernel, in radians.
      effective_learning_rate: the learning rate of the kernel's direction; see
        `normjax.optim.effective_learning_rate`.
    """

    norm: Float[Array, "..."]
    gradient_norm: Float[Array, "..."]
    cosine: Float[Array, "..."]
    chance: Float[Array, "..."]
    angle: Float[Array, "..."]
    effective_learning_rate: Float[Array, "..."]


def rotation(
    params: PyTree,
    gradients: PyTree,
    updated: PyTree,
    *,
    learning_rate: ArrayLike,
    optimizer: Optimizer = "sgd",
    feature_axes: Axes = (),
    mask: Mask | None = None,
) -> dict[str, Rotation]:
    r"""Measures how a step of training turns each kernel.

    .. math:: \text{angle} = \arccos \frac{\langle w, w' \rangle}{\lVert w \rVert \lVert w'
              \rVert}, \qquad
              \text{cosine} = \frac{\langle w, g \rangle}{\lVert w \rVert \lVert g \rVert}

    Of a kernel before normalization only the direction counts, so the angle is all that a step
    changes in the network. Without weight decay, such kernels grow, since each gradient is
    orthogonal to them, and so they turn less and less, as if the learning rate had a schedule that
    nobody chose. With weight decay, the angle settles; see `equilibrium`.

    Call it in the training step, under `jax.jit`, and stack the results, as `lax.scan` does. The
    stacked results are the history for `equilibrium` and `plot.rotation`.

    Args:
      params: the parameters before the step: any tree of arrays, an nnx module or its state.
      gradients: the gradients of the step, a tree like `params`.
      updated: the parameters after the step, a tree like `params`.
      learning_rate: the learning rate of the step, a number or a scalar array.
      optimizer: "sgd" (with or without momentum), or "adam" for all optimizers that normalize their
        steps.
      feature_axes: the axes along which each slice has its own direction, such as -1 for the output
        channels before batch norm; `()` for one direction of the whole kernel.
      mask: the leaves to measure: bools in a tree of the structure of `params` or a prefix of it,
        or a function from parameters to it, such as `normjax.optim.decay_mask` for kernels; None
        for all.

    Returns:
      A `Rotation` for each leaf by its path, such as `"block/conv/kernel"`. Angles are computed in
      at least float32, with a formula that is accurate for small angles. A kernel of zeros has no
      direction: its angle and cosine are 0.

    Raises:
      ValueError: for trees that do not match, for feature axes that a leaf does not have (with its
        path), and for an unknown optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
      >>> gradients = {"kernel": jnp.array([[0.0], [1.0]])}
      >>> updated = jax.tree.map(lambda w, g: w - 2.0 * g, params, gradients)
      >>> found = nj.diagnostics.rotation(params, gradients, updated, learning_rate=2.0)["kernel"]
      >>> print(f"{found.norm} {found.cosine} {found.angle:.4f} {found.effective_learning_rate}")
      2.0 0.0 0.7854 0.5

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
      Kosson, Messmer & Jaggi, "Rotational Equilibrium: How Weight Decay Balances Learning Across
      Neural Networks" (ICML 2024).
    """
    _checks.choice(FUNCTION, "optimizer", optimizer, OPTIMIZERS)
    trees = {"params": plain(params), "gradients": plain(gradients), "updated": plain(updated)}
    for name, tree in trees.items():
        check_arrays(FUNCTION, name, tree)
        check_alike(FUNCTION, (name, tree), ("params", trees["params"]))
    chosen = spread(FUNCTION, "mask", True if mask is None else mask, trees["params"])
    all_trees = (chosen, *trees.values())
    flat = [dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in all_trees]
    is_chosen, before, slopes, after = flat
    options: dict[str, Any] = {"feature_axes": feature_axes, "optimizer": optimizer}
    measured = {}
    for path, leaf in before.items():
        if is_chosen[path] and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            w, g, new = map(jnp.asarray, (leaf, slopes[path], after[path]))
            axes = reduced_axes(FUNCTION, feature_axes, w, path)
            rate = effective_learning_rate(w, learning_rate, **options)
            measured["/".join(path_names(path))] = _rotation(w, g, new, axes, rate)
    return measured


def _rotation(w: Array, g: Array, new: Array, axes: tuple[int, ...], rate: Array) -> Rotation:
    length, others = norm(w, axes), math.prod(w.shape[axis] for axis in axes)
    direction, slope, turned = unit(w, axes), unit(g, axes), unit(new, axes)
    # The arccos of a cosine would lose angles below 3e-4 in float32.
    angle = 2 * jnp.arctan2(norm(turned - direction, axes), norm(turned + direction, axes))
    return Rotation(
        norm=length.squeeze(axes),
        gradient_norm=norm(g, axes).squeeze(axes),
        cosine=inner(direction, slope, axes).squeeze(axes),
        chance=jnp.full_like(rate, 1 / math.sqrt(others)),
        angle=jnp.where((length > 0) & (norm(new, axes) > 0), angle, 0).squeeze(axes),
        effective_learning_rate=rate,
    )
