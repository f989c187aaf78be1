"""Removes the radial component of updates: SGDP and AdamP (Heo et al., 2021)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from normjax._trees import KeyPath, Mask, spread
from normjax._typing import Axes, widen
from normjax.optim._transformations import check_params, transformation
from normjax.optim.directions import inner as inner_product
from normjax.optim.directions import reduced_axes, tangent, unit


def project_scale_invariant(
    mask: Mask | None = None,
    *,
    inner: optax.GradientTransformation | None = None,
    feature_axes: Axes = (),
    delta: ArrayLike = 0.1,
    weight_decay: ArrayLike = 0.0,
    wd_ratio: ArrayLike = 0.1,
    weight_decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes the radial component of updates of scale-invariant kernels.

    .. math:: u \leftarrow u - \frac{\langle w, u \rangle}{\lVert w \rVert^2} w

    If only the direction of a kernel matters, as before a normalization, its gradients are
    orthogonal to it. Momentum, a sum of past gradients, is not: it increases the norm of the
    kernel, so the effective learning rate decreases sooner than intended.

    A mask selects the updates to project. Without a mask, they are selected in each step as in the
    paper, by this condition on the gradient g:

    .. math:: \max_c \frac{|\langle w_c, g_c \rangle|}{\lVert w_c \rVert \lVert g_c \rVert}
              < \frac{\delta}{\sqrt{\dim w_c}}

    first with a w_c for each output channel (the last axis), then with a single w_c for the whole
    kernel. Updates of rank 1 are never projected. SGDP and AdamP are:

        sgdp = optax.chain(
            nj.optim.project_scale_invariant(inner=optax.trace(0.9), weight_decay=1e-4),
            optax.scale_by_learning_rate(0.1),
        )
        adamp = optax.chain(
            nj.optim.project_scale_invariant(inner=optax.scale_by_adam(), weight_decay=1e-2),
            optax.scale_by_learning_rate(1e-3),
        )

    This is the algorithm of the paper, and equals the authors' AdamP. Their SGDP differs: it
    divides `weight_decay` by `1 - momentum`, and without Nesterov momentum it stores the projected
    momentum. With Nesterov momentum, their AdamP differs from optax's
    `scale_by_adam(nesterov=True)`: its first step is 29% larger; see the page "Optimizers".

    With a mask, no gradients are needed, so the transformation can also be an element of a chain:
    `optax.chain(optax.scale_by_adam(), project_scale_invariant(mask), ...)`. Weight decay is
    radial, so put it after this transformation, which would remove it otherwise.

    Args:
      mask: a tree of bools with the structure of the parameters or a prefix of it, or a function
        from parameters to such a tree; see `scale_invariant`. None for the test above.
      inner: the transformation from the gradients, which are tested, to the updates; None if the
        updates are the gradients.
      feature_axes: for the kernels of the mask, the axes along which each slice has its own
        direction: `()` for one direction of the whole kernel; -1 for each output channel before
        batch norm.
      delta: the delta of the test. The paper uses 0.1 for all networks.
      weight_decay: lambda; `lambda * w` is added to the updates.
      wd_ratio: the fraction of `weight_decay` for projected kernels, which grow more slowly, so
        they need less decay.
      weight_decay_mask: a mask of the parameters to decay, such as `nj.optim.decay_mask`; None for
        all, as in the paper.

    Returns:
      An optax transformation with the state of `inner`. Inner products and norms are computed in at
      least float32; updates keep their dtype. Under `jax.jit`, sums over sharded axes are sharded.

    Raises:
      ValueError: from `update`, if params are missing, if trees do not match, or if a kernel lacks
        feature axes.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params = {"kernel": jnp.array([[2.0], [0.0]])}
      >>> updates = {"kernel": jnp.array([[1.0], [1.0]])}
      >>> project = nj.optim.project_scale_invariant({"kernel": True})
      >>> print(project.update(updates, project.init(params), params)[0]["kernel"].ravel())
      [0. 1.]

    References:
      Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights" (ICLR 2021), Algorithms 1 and 2.
    """
    function = "project_scale_invariant"
    wrapped = transformation(function, optax.identity() if inner is None else inner)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_params(function, updates, params)
        chosen = spread(function, "mask", True if mask is None else mask, params)
        decay_mask = True if weight_decay_mask is None else weight_decay_mask
        decays = spread(function, "weight_decay_mask", decay_mask, params)

        def projected(
            path: KeyPath, w: Array, gradient: Array, u: Array, chosen: bool, decays: bool
        ) -> Array:
            part = jnp.ones(())
            new = u
            if chosen and mask is None:
                new, part = _tested(w, gradient, u, delta, wd_ratio)
            elif chosen:
                new = tangent(u, w, reduced_axes(function, feature_axes, w, path))
                part = jnp.asarray(wd_ratio)
            if decays:
                wide = widen(w)
                new = widen(new) + (weight_decay * part).astype(wide.real.dtype) * wide
            return new.astype(u.dtype)

        proposed, state = wrapped.update(updates, state, params, **extra)
        trees = (params, updates, proposed, chosen, decays)
        return jax.tree_util.tree_map_with_path(projected, *trees), state

    return optax.GradientTransformationExtraArgs(wrapped.init, update)


def _tested(
    w: Array, gradient: Array, u: Array, delta: ArrayLike, wd_ratio: ArrayLike
) -> tuple[Array, Array]:
    """Returns the update and the fraction of decay that the test of the gradient selects."""
    new, part = widen(u), jnp.ones(())
    if w.ndim < 2:
        return new, part
    channels, whole = tuple(range(w.ndim - 1)), tuple(range(w.ndim))
    for axes in (whole, channels):  # the last test that passes applies
        passes = _orthogonal(gradient, w, axes, delta)
        new = jnp.where(passes, tangent(u, w, axes), new)
        part = jnp.where(passes, wd_ratio, part)
    return new, part


def _orthogonal(gradient: Array, w: Array, axes: tuple[int, ...], delta: ArrayLike) -> Array:
    """Returns whether the largest cosine of gradient and kernel is below delta / sqrt(dim)."""
    cosines = jnp.abs(inner_product(unit(gradient, axes), unit(w, axes), axes))
    return jnp.max(cosines) < delta / math.sqrt(math.prod(w.shape[axis] for axis in axes))
