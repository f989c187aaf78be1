"""Keeps kernels on the unit sphere, with updates of their direction."""

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

_BETA = 0.9  # the decay of the moving average of squared norms
Rotation = ArrayLike | Callable[[Array], ArrayLike]


class RenormalizeState(NamedTuple):
    """State of `renormalize`.

    Attributes:
      count: the number of steps.
      inner_state: the state of the inner transformation.
      radius: for each selected kernel, the norm that it would have without `renormalize`, in at
        least float32. With a `rotation`, the moving average of the squared norm of its steps.
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
    r"""Keeps scale-invariant kernels on the unit sphere, and rotates them as `inner` would.

    If only the direction of a kernel matters, as before a normalization, a step of SGD with weight
    decay splits into a step of its direction and a step of its radius, :math:`w = r \theta`:

    .. math:: \tilde\theta = (1 - \eta \lambda) \theta - \frac{\eta}{r^2} \nabla f(\theta), \qquad
              \theta' = \frac{\tilde\theta}{\lVert \tilde\theta \rVert}, \qquad
              r' = r \lVert \tilde\theta \rVert

    since :math:`\nabla f(r \theta) = \nabla f(\theta) / r`. The parameters have norm 1, and r is
    stored in the state. `inner` (momentum, Adam, ...) receives the kernel :math:`r \theta` and its
    gradient, so theta and the *function* of the network are the same as without `renormalize`.

    With `rotation`, kernels rotate from the first step by the angle that learning rate and weight
    decay reach in equilibrium (the rotational variants of Kosson et al.):

    .. math:: t = u - \langle \theta, u \rangle \theta, \qquad
              \nu' = \beta \nu + (1 - \beta) \lVert t \rVert^2, \qquad
              \theta' \propto \theta + \hat\eta \frac{t}{\sqrt{\nu' / (1 - \beta^k)}}

    where u is the update of `inner`, and beta = 0.9. All kernels rotate at the same rate, without
    warm-up. Parameters outside of the mask get the updates of `inner` unchanged.

    Args:
      mask: the kernels to normalize: a tree of bools with the structure of the parameters or a
        prefix of it, or a function from parameters to such a tree; see `scale_invariant`.
      inner: a complete optimizer, including the learning rate and sign, such as
        `optax.adamw(1e-3)`.
      feature_axes: the axes along which each slice has its own direction: `()` for one direction of
        the whole kernel; -1 for each output channel before batch norm.
      rotation: root mean square angle per step, in radians, or a schedule of it; see
        `rotational_equilibrium`. None uses the angle of `inner`.

    Returns:
      An optax transformation, which must be the last one of a chain. Its first update moves the
      kernels to the sphere; r starts at their norms. A kernel of zeros has no direction, so it gets
      the updates of `inner` until it is nonzero. Updates are computed in at least float32 and have
      the dtype of the gradients. Under `jax.jit`, sums over sharded axes are sharded.

    Raises:
      ValueError: from `init` and `update`, if params are missing, if trees do not match, or if a
        kernel lacks feature axes.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj, optax
      >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
      >>> optimizer = nj.optim.renormalize({"kernel": True}, optax.sgd(0.1))
      >>> gradients = {"kernel": jnp.zeros((2, 1))}
      >>> updates, state = optimizer.update(gradients, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["kernel"].ravel().round(3), state.radius["kernel"].ravel())
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
        shown = jax.tree.map(_times, params, factors)
        gradients = jax.tree.map(_over, updates, factors)
        updates, inner_state = self.inner.update(gradients, state.inner_state, shown, **extra)
        turned = jax.tree.map(turn, params, factors, updates, state.radius, axes)
        updates = jax.tree.map(operator.itemgetter(0), turned, is_leaf=_is_turned)
        radii = jax.tree.map(operator.itemgetter(1), turned, is_leaf=_is_turned)
        return updates, RenormalizeState(count, inner_state, radii)

    def _axes(self, params: PyTree) -> PyTree[_Axes]:
        def reduced(path: KeyPath, w: Array, chosen: bool) -> _Axes:
            if not chosen:
                return _Axes(None)
            return _Axes(reduced_axes("renormalize", self.feature_axes, w, path))

        chosen = spread("renormalize", "mask", self.mask, params)
        return jax.tree_util.tree_map_with_path(reduced, params, chosen)


def _times(w: Array, factor: ArrayLike) -> Array:
    return (widen(w) * factor).astype(w.dtype)


def _over(g: Array, factor: ArrayLike) -> Array:
    return (widen(g) / factor).astype(g.dtype)


class _Turned(NamedTuple):
    """The update of a kernel, and its new radius."""

    update: Array
    radius: Array


def _is_turned(node: object) -> bool:
    return isinstance(node, _Turned)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes over which a kernel's norm is computed; None for a parameter outside of the mask."""

    reduced: tuple[int, ...] | None


def _stretch(w: Array, radius: Array, axes: tuple[int, ...] | None) -> ArrayLike:
    """Returns the factor that gives w the norm `radius`; 1 for zeros and outside of the mask."""
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
    """Returns theta after a rotation, and the moving average of squared norms."""
    step = tangent(u, theta, axes)
    mean_square = _BETA * mean_square + (1 - _BETA) * norm(step, axes) ** 2
    length = jnp.sqrt(mean_square / (1 - _BETA ** count.astype(mean_square.dtype)))
    turn = jnp.asarray(angle, length.dtype) / jnp.where(length > 0, length, 1)
    return theta + turn * step, mean_square
