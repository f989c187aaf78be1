"""Kernels on the unit sphere, and the angular updates that are equivalent to learning rate and weight decay."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int, PyTree

from normjax._trees import KeyPath, Mask, spread
from normjax._typing import Axes, widen
from normjax.optim._transformations import check_params, transformation
from normjax.optim.directions import norm, reduced_axes, tangent, unit

_BETA = 0.9  # of the mean of squared lengths
Rotation = ArrayLike | Callable[[Array], ArrayLike]


class RenormalizeState(NamedTuple):
    """State of `renormalize`.

    Attributes:
      count: of steps.
      inner_state: of the inner transformation.
      radius: for each chosen kernel the norm that it would have off the sphere, in at least
        float32. With a `rotation`: the moving mean of the squared length of its steps.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: optax.OptState
    radius: PyTree[Array]


def renormalize(
    mask: Mask,
    inner: optax.GradientTransformation,
    *,
    feature_axes: Axes = (),
    rotation: Rotation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps kernels of which only the direction counts on the unit sphere, and turns them as `inner` would.

    For SGD with learning rate and weight decay, the step of :math:`w = r \theta` is one of its
    direction and radius:

    .. math:: \tilde\theta = (1 - \eta \lambda) \theta - \frac{\eta}{r^2} \nabla f(\theta), \qquad
              \theta' = \frac{\tilde\theta}{\lVert \tilde\theta \rVert}, \qquad
              r' = r \lVert \tilde\theta \rVert

    as :math:`\nabla f(r \theta) = \nabla f(\theta) / r`. So theta and the *function* of the network
    follow the path that they would without `renormalize`, for any `inner` (momentum, Adam, ...): it
    is shown the kernel :math:`r \theta` and its gradient, while parameters have norm 1, whatever
    decay and learning rate do, and r is a number in the state.

    With `rotation`, learning rate and weight decay act through the angle alone that they lead to in
    the long run, from the first step on (Kosson et al.'s rotational variants):

    .. math:: t = u - \langle \theta, u \rangle \theta, \qquad
              \nu' = \beta \nu + (1 - \beta) \lVert t \rVert^2, \qquad
              \theta' \propto \theta + \hat\eta \frac{t}{\sqrt{\nu' / (1 - \beta^k)}}

    with the update u of `inner`, of which only the direction counts, and beta = 0.9. All kernels
    turn at the same rate, without warm-up. Parameters that are not in the mask have the updates of
    `inner` as they are.

    Args:
      mask: which kernels: bools in a tree of the structure of the parameters or a prefix of it, or
        a function from parameters to it; see `scale_invariant`.
      inner: a whole optimizer, with its learning rate (and sign), such as `optax.adamw(1e-3)`.
      feature_axes: the axes that have a direction of their own: `()` for one of the whole kernel;
        -1 for each output channel before batch norm.
      rotation: root mean square angle per step, in radians, or a schedule of it; see
        `rotational_equilibrium`. None for the angle of `inner`.

    Returns:
      An optax transformation, the last of a chain. Its first update puts the kernels on the sphere;
      their norms until then are where r starts. A kernel of zeros has no direction, and gets the
      updates of `inner` until it has one. Computed in at least float32; updates have the dtype of
      the gradients. Where axes are sharded under `jax.jit`, so are the sums.

    Raises:
      ValueError: from `init` and `update`, for missing params, trees that do not match, or feature
        axes that a kernel lacks.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj, optax
      >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
      >>> optimizer = nj.optim.renormalize({"kernel": True}, optax.sgd(0.1))
      >>> updates, state = optimizer.update({"kernel": jnp.zeros((2, 1))}, optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"].ravel().round(3), state.radius["kernel"].ravel())
      [0.6 0.8] [5.]

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
      Kosson, Messmer & Jaggi, "Rotational Equilibrium" (ICML 2024), Algorithm 1 and Table 1.
    """
    sphere = _Sphere(mask, transformation("renormalize", inner), feature_axes, rotation)
    return optax.GradientTransformationExtraArgs(sphere.init, sphere.update)


class _Sphere(NamedTuple):
    """The arguments of `renormalize`, and the two functions that it returns."""

    mask: Mask
    inner: optax.GradientTransformationExtraArgs
    feature_axes: Axes
    rotation: Rotation | None

    def init(self, params: optax.Params) -> RenormalizeState:
        def radius(w: Array, axes: _Axes) -> Array:
            if axes.reduced is None:
                return jnp.zeros(())
            length = norm(w, axes.reduced)
            return length if self.rotation is None else jnp.zeros_like(length)

        radii = jax.tree.map(radius, params, self._axes(params))
        return RenormalizeState(jnp.zeros((), jnp.int32), self.inner.init(params), radii)

    def update(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, RenormalizeState]:
        check_params("renormalize", updates, params)
        angle = self.rotation(state.count) if callable(self.rotation) else self.rotation
        count = jnp.asarray(optax.safe_increment(state.count))

        def stretch(w: Array, radius: Array, axes: _Axes) -> ArrayLike:
            return _stretch(w, radius if angle is None else jnp.ones_like(radius), axes.reduced)

        advance = _free if angle is None else partial(_rotated, angle=angle, count=count)

        def turn(w: Array, factor: ArrayLike, u: Array, radius: Array, axes: _Axes) -> _Turned:
            if axes.reduced is None:
                return _Turned(u, radius)
            moved, radius = advance(widen(w) * factor, u, radius, axes.reduced)
            return _Turned((unit(moved, axes.reduced) - widen(w)).astype(u.dtype), radius)

        axes = self._axes(params)
        factors = jax.tree.map(stretch, params, state.radius, axes)
        shown = jax.tree.map(lambda w, factor: (widen(w) * factor).astype(w.dtype), params, factors)
        gradients = jax.tree.map(
            lambda g, factor: (widen(g) / factor).astype(g.dtype), updates, factors
        )
        updates, inner_state = self.inner.update(gradients, state.inner_state, shown, **extra)
        turned = jax.tree.map(turn, params, factors, updates, state.radius, axes)
        updates, radii = (
            jax.tree.map(operator.itemgetter(part), turned, is_leaf=_is_turned) for part in (0, 1)
        )
        return updates, RenormalizeState(count, inner_state, radii)

    def _axes(self, params: PyTree) -> PyTree[_Axes]:
        def reduced(path: KeyPath, w: Array, chosen: bool) -> _Axes:
            return _Axes(
                reduced_axes("renormalize", self.feature_axes, w, path) if chosen else None
            )

        return jax.tree_util.tree_map_with_path(
            reduced, params, spread("renormalize", "mask", self.mask, params)
        )


class _Turned(NamedTuple):
    """What a step makes of a kernel."""

    update: Array
    radius: Array


def _is_turned(node: object) -> bool:
    return isinstance(node, _Turned)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes that a kernel's norm is taken over, as a leaf of a tree; None where it is not on the sphere."""

    reduced: tuple[int, ...] | None


def _stretch(w: Array, radius: Array, axes: tuple[int, ...] | None) -> ArrayLike:
    """The factor that gives w the norm that is asked for; 1 for zeros, and where w is to stay as it is."""
    if axes is None:
        return 1.0
    length = norm(w, axes)
    known = (length > 0) & (radius > 0)
    return jnp.where(known, radius / jnp.where(known, length, 1), 1)


def _free(shown: Array, u: Array, radius: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns the kernel after the step that `inner` makes, and its norm."""
    del radius
    moved = shown + widen(u)
    return moved, norm(moved, axes)


def _rotated(
    theta: Array,
    u: Array,
    mean_square: Array,
    axes: tuple[int, ...],
    *,
    angle: ArrayLike,
    count: Array,
) -> tuple[Array, Array]:
    """Returns theta after a step of the angle, and the moving mean of squared lengths."""
    step = tangent(u, theta, axes)
    mean_square = _BETA * mean_square + (1 - _BETA) * norm(step, axes) ** 2
    length = jnp.sqrt(mean_square / (1 - _BETA ** count.astype(mean_square.dtype)))
    turn = jnp.asarray(angle, length.dtype) / jnp.where(length > 0, length, 1)
    return theta + turn * step, mean_square
