"""The loss and its gradient along the direction that training takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from normjax import _checks
from normjax._trees import check_alike
from normjax.diagnostics._losses import Loss, checked, difference, differentiable, moved, norm


class Landscape(NamedTuple):
    """The loss and its gradient at points along a line; with leading axes of steps, where it was recorded over them.

    Attributes:
      loss: L(w), at the parameters, `(*steps,)`.
      losses: L(w + s d) for each step size s, `(*steps, points)`.
      gradient_distances: how far the gradient there is from that at w, Euclidean, `(*steps,
        points)`.
      distances: how far the points are, |s| times the length of d, `(*steps, points)`.
    """

    loss: Float[Array, "*steps"]
    losses: Float[Array, "*steps points"]
    gradient_distances: Float[Array, "*steps points"]
    distances: Float[Array, "*steps points"]

    @property
    def loss_range(self) -> tuple[Float[Array, "*steps"], Float[Array, "*steps"]]:
        """The lowest and the highest loss, of the points and of w itself."""
        return jnp.minimum(self.loss, self.losses.min(-1)), jnp.maximum(
            self.loss, self.losses.max(-1)
        )

    @property
    def variation(self) -> Float[Array, "*steps"]:
        """How much the loss varies: the highest less the lowest."""
        lowest, highest = self.loss_range
        return highest - lowest

    @property
    def gradient_range(self) -> tuple[Float[Array, "*steps"], Float[Array, "*steps"]]:
        """The smallest and the largest distance of gradients: how well that of w predicts the others."""
        return self.gradient_distances.min(-1), self.gradient_distances.max(-1)

    @property
    def smoothness(self) -> Float[Array, "*steps"]:
        """The effective beta-smoothness: the largest ratio of the gradient's distance to that of the point."""
        # at a stationary point, no point is another
        moved = jnp.where(self.distances > 0, self.distances, 1)
        return (self.gradient_distances / moved).max(-1)


def landscape(
    loss: Loss,
    params: PyTree,
    *,
    step_sizes: Sequence[float] | Array,
    direction: PyTree | None = None,
) -> Landscape:
    r"""Walks along the gradient and measures how the loss and the gradient change: how far a step can be trusted.

    From the parameters w, with the gradient g, in the direction d = -g, for each step size s:

    .. math:: L(w + s d), \qquad
              \lVert \nabla L(w + s d) - g \rVert_2, \qquad
              \beta = \max_s \frac{\lVert \nabla L(w + s d) - g \rVert_2}{\lVert s d \rVert_2}

    The range of the first is the *variation of the loss*, that of the second the *gradient
    predictiveness*, and beta the *effective smoothness*, never more than the largest |eigenvalue|
    of the Hessian on the way.

    It costs a gradient for each step size, and one more. It compiles itself, each time that it is
    called; in a training loop, compile it once, as in the example. Stacked, as by `lax.scan`, or by
    `jax.tree.map(lambda *x: jnp.stack(x), *history)`, it is what
    `normjax.diagnostics.plot.landscape` draws.

    Args:
      loss: from parameters (or the module) to the loss, a scalar, on *one* batch and in training
        mode; new statistics are left out.
      params: any tree of arrays, or an nnx module, of which its `nnx.Param`s count. Read in at
        least float32.
      step_sizes: s, finite and not 0, such as the learning rates in question; negative ones walk
        uphill.
      direction: d, a tree like `params`, such as what an optimizer would add to them at a learning
        rate of 1; None for the negative gradient.

    Returns:
      A `Landscape` of `len(step_sizes)` points, in at least float32.

    Raises:
      ValueError: for step sizes of 0, or a direction that does not fit `params`.
      TypeError: for parameters that are not real floating-point, or a loss that is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> curvature = jnp.array([1.0, 8.0])
      >>> loss = lambda params: 0.5 * jnp.sum(curvature * params["w"] ** 2)
      >>> walk = jax.jit(lambda params: nj.diagnostics.landscape(loss, params, step_sizes=(1/16, 1/8, 1/4)))
      >>> seen = walk({"w": jnp.array([0.0, 1.0])})
      >>> print(seen.loss, seen.losses, seen.smoothness)
      4.0 [1. 0. 4.] 8.0

    References:
      Santurkar, Tsipras, Ilyas & Madry, "How Does Batch Normalization Help Optimization?" (NeurIPS
      2018), section 3.2, figures 4 and 9.
    """
    loss, params = checked("landscape", loss, params)
    sizes = _sizes(step_sizes)
    if direction is not None:
        check_alike("landscape", ("direction", direction), ("params", params))
        direction = differentiable("landscape", "direction", direction)

    @jax.jit
    def walk(params: PyTree, direction: PyTree | None, sizes: Array) -> Landscape:
        start, gradient = jax.value_and_grad(loss)(params)
        way = jax.tree.map(jnp.negative, gradient) if direction is None else direction

        def point(size: Array) -> tuple[Array, Array, Array]:
            there = moved(params, way, size)
            value, slope = jax.value_and_grad(loss)(there)
            return value, norm(difference(slope, gradient)), norm(difference(there, params))

        losses, gradient_distances, distances = lax.map(point, sizes)
        return Landscape(start, losses, gradient_distances, distances)

    return walk(params, direction, sizes)


def _sizes(step_sizes: Sequence[float] | Array) -> Float[Array, " points"]:
    """Returns step sizes as an array; refuses what is none, and points that would be where the walk starts."""
    if not isinstance(step_sizes, jax.Array):
        for size in np.atleast_1d(step_sizes).tolist():
            _checks.between("landscape", "step_sizes", size, -math.inf, math.inf)
        step_sizes = jnp.asarray(step_sizes, float)
    got = f"step_sizes of shape {step_sizes.shape}"
    empty = step_sizes.ndim != 1 or step_sizes.size == 0
    if empty or not isinstance(step_sizes, Tracer) and (np.asarray(step_sizes) == 0).any():
        _checks.raise_error(
            "landscape",
            "step_sizes are no points on a line",
            expected="one axis of sizes other than 0",
            got=got if empty else f"step_sizes={step_sizes.tolist()}",
            fix="Pass a few learning rates, as in (0.05, 0.1, 0.2)",
        )
    return step_sizes
