"""Measures the loss and its gradient along the direction of a training step."""

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
from normjax.diagnostics.instruments._losses import (
    Loss,
    checked,
    difference,
    differentiable,
    moved,
    norm,
)


class Landscape(NamedTuple):
    """The loss and its gradient along a line; stacked histories have leading axes of steps.

    Attributes:
      loss: L(w), at the parameters, `(*steps,)`.
      losses: L(w + s d) for each step size s, `(*steps, points)`.
      gradient_distances: the Euclidean distance between the gradients at w + s d and at w,
        `(*steps, points)`.
      distances: the distance between w + s d and w, |s| times the length of d, `(*steps, points)`.
    """

    loss: Float[Array, "*steps"]
    losses: Float[Array, "*steps points"]
    gradient_distances: Float[Array, "*steps points"]
    distances: Float[Array, "*steps points"]

    @property
    def loss_range(self) -> tuple[Float[Array, "*steps"], Float[Array, "*steps"]]:
        """Returns the lowest and the highest loss, including the loss at w."""
        lowest = jnp.minimum(self.loss, self.losses.min(-1))
        return lowest, jnp.maximum(self.loss, self.losses.max(-1))

    @property
    def variation(self) -> Float[Array, "*steps"]:
        """Returns the highest minus the lowest loss."""
        lowest, highest = self.loss_range
        return highest - lowest

    @property
    def gradient_range(self) -> tuple[Float[Array, "*steps"], Float[Array, "*steps"]]:
        """Returns the smallest and largest distance of gradients: the gradient predictiveness."""
        return self.gradient_distances.min(-1), self.gradient_distances.max(-1)

    @property
    def smoothness(self) -> Float[Array, "*steps"]:
        """Returns the effective beta-smoothness: the largest `gradient_distances / distances`."""
        # At a stationary point all distances are 0.
        moved = jnp.where(self.distances > 0, self.distances, 1)
        return (self.gradient_distances / moved).max(-1)


def landscape(
    loss: Loss,
    params: PyTree,
    *,
    step_sizes: Sequence[float] | Array,
    direction: PyTree | None = None,
) -> Landscape:
    r"""Measures how the loss and the gradient change along the direction of the gradient.

    At the parameters w, with the gradient g and the direction d = -g, for each step size s:

    .. math:: L(w + s d), \qquad
              \lVert \nabla L(w + s d) - g \rVert_2, \qquad
              \beta = \max_s \frac{\lVert \nabla L(w + s d) - g \rVert_2}{\lVert s d \rVert_2}

    The range of the first is the *variation of the loss*, the range of the second the *gradient
    predictiveness*. Beta is the *effective smoothness*, at most the largest |eigenvalue| of the
    Hessian along the line.

    It computes a gradient for each step size, and one more. It compiles at each call; in a training
    loop, compile it once, as in the example. `normjax.diagnostics.plot.landscape` draws stacked
    results, as `lax.scan` or `jax.tree.map(lambda *x: jnp.stack(x), *history)` makes them.

    Args:
      loss: maps parameters (or the module) to the loss, a scalar, on *one* batch, in training mode
        and without new statistics.
      params: any tree of arrays, or an nnx module: its `nnx.Param`s. They are read in at least
        float32.
      step_sizes: the values of s, finite and not 0, such as learning rates; negative ones go
        uphill.
      direction: d, a tree like `params`, such as an optimizer's updates at a learning rate of 1;
        None for the negative gradient.

    Returns:
      A `Landscape` of `len(step_sizes)` points, in at least float32.

    Raises:
      ValueError: for step sizes of 0, or a direction that does not match `params`.
      TypeError: for parameters that are not real floating-point, or a loss that is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> curvature = jnp.array([1.0, 8.0])
      >>> loss = lambda params: 0.5 * jnp.sum(curvature * params["w"] ** 2)
      >>> sizes = (1 / 16, 1 / 8, 1 / 4)
      >>> walk = jax.jit(lambda params: nj.diagnostics.landscape(loss, params, step_sizes=sizes))
      >>> found = walk({"w": jnp.array([0.0, 1.0])})
      >>> print(found.loss, found.losses, found.smoothness)
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
    """Returns step sizes as an array; raises an error if one is 0 or not finite."""
    if not isinstance(step_sizes, jax.Array):
        for size in np.atleast_1d(step_sizes).tolist():
            _checks.between("landscape", "step_sizes", size, -math.inf, math.inf)
        step_sizes = jnp.asarray(step_sizes, float)
    got = f"step_sizes of shape {step_sizes.shape}"
    empty = step_sizes.ndim != 1 or step_sizes.size == 0
    if empty or not isinstance(step_sizes, Tracer) and (np.asarray(step_sizes) == 0).any():
        _checks.raise_error(
            "landscape",
            "step_sizes are not points on a line",
            expected="one axis of sizes other than 0",
            got=got if empty else f"step_sizes={step_sizes.tolist()}",
            fix="Pass a few learning rates, as in (0.05, 0.1, 0.2)",
        )
    return step_sizes
