"""Updates without their radial part: SGDP and AdamP (Heo et al., 2021)."""

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
    r"""Removes the radial part of updates: what lengthens a kernel of which only the direction counts.

    .. math:: u \leftarrow u - \frac{\langle w, u \rangle}{\lVert w \rVert^2} w

    Gradients of such a kernel are orthogonal to it, but momentum, being a sum of past ones, is not:
    it lengthens the kernel, and so lowers its effective learning rate, sooner than intended.

    With a mask, its kernels are projected. Without one, kernels are found at each step as in the
    paper: those whose gradient g satisfies

    .. math:: \max_c \frac{|\langle w_c, g_c \rangle|}{\lVert w_c \rVert \lVert g_c \rVert}
              < \frac{\delta}{\sqrt{\dim w_c}}

    first with a w_c for each output channel (the last axis), then with one for the whole kernel;
    leaves of rank 1 are never among them. SGDP and AdamP are

        optax.chain(
            nj.optim.project_scale_invariant(inner=optax.trace(0.9), weight_decay=1e-4),  # SGDP
            optax.scale_by_learning_rate(0.1),
        )
        optax.chain(
            nj.optim.project_scale_invariant(inner=optax.scale_by_adam(), weight_decay=1e-2),  # AdamP
            optax.scale_by_learning_rate(1e-3),
        )

    This is the paper's algorithm, and what the authors' AdamP does. Their SGDP differs: it divides
    `weight_decay` by `1 - momentum`, and without Nesterov's momentum keeps the projected one.

    With a mask it needs no gradients, and can also be a link of its own:
    `optax.chain(optax.scale_by_adam(), project_scale_invariant(mask), ...)`. Weight decay is
    radial: in a link before this one it would be removed.

    Args:
      mask: bools in a tree of the structure of the parameters or a prefix of it, or a function from
        parameters to it; see `scale_invariant`. None for the test above.
      inner: makes the updates from gradients, which the test is about; None where updates are
        gradients.
      feature_axes: for the kernels of the mask, the axes that have a direction of their own: `()`
        for one of the whole kernel; -1 for each output channel before batch norm.
      delta: of the test. The paper's 0.1 is for all networks.
      weight_decay: lambda; `lambda * w` is added to the updates.
      wd_ratio: the part of `weight_decay` that projected kernels have. Their steps stay small
        enough without.
      weight_decay_mask: where weight decay acts, such as `nj.optim.decay_mask`; None for
        everywhere, as in the paper.

    Returns:
      An optax transformation whose state is that of `inner`. Inner products and norms are taken in
      at least float32, updates keep their dtype. Where axes are sharded under `jax.jit`, so are the
      sums.

    Raises:
      ValueError: from `update`, for missing params, trees that do not match, or feature axes that a
        kernel lacks.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, updates = {"kernel": jnp.array([[2.0], [0.0]])}, {"kernel": jnp.array([[1.0], [1.0]])}
      >>> project = nj.optim.project_scale_invariant({"kernel": True})
      >>> print(project.update(updates, project.init(params), params)[0]["kernel"].ravel())
      [0. 1.]

    References:
      Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
        Weights" (ICLR 2021),
      Algorithms 1 and 2.
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
        decays = spread(
            function,
            "weight_decay_mask",
            True if weight_decay_mask is None else weight_decay_mask,
            params,
        )

        def projected(
            path: KeyPath, w: Array, gradient: Array, u: Array, chosen: bool, decays: bool
        ) -> Array:
            part = jnp.ones(())
            new = u
            if chosen and mask is None:
                new, part = _tested(w, gradient, u, delta, wd_ratio)
            elif chosen:
                new, part = (
                    tangent(u, w, reduced_axes(function, feature_axes, w, path)),
                    jnp.asarray(wd_ratio),
                )
            if decays:
                wide = widen(w)
                new = widen(new) + (weight_decay * part).astype(wide.real.dtype) * wide
            return new.astype(u.dtype)

        proposed, state = wrapped.update(updates, state, params, **extra)
        return jax.tree_util.tree_map_with_path(
            projected, params, updates, proposed, chosen, decays
        ), state

    return optax.GradientTransformationExtraArgs(wrapped.init, update)


def _tested(
    w: Array, gradient: Array, u: Array, delta: ArrayLike, wd_ratio: ArrayLike
) -> tuple[Array, Array]:
    """Returns the update, projected where the gradient is orthogonal to the kernel, and the part of decay to keep."""
    new, part = widen(u), jnp.ones(())
    if w.ndim < 2:
        return new, part
    channels, whole = tuple(range(w.ndim - 1)), tuple(range(w.ndim))
    for axes in (whole, channels):  # the last one that fits has the last word
        fits = _orthogonal(gradient, w, axes, delta)
        new, part = jnp.where(fits, tangent(u, w, axes), new), jnp.where(fits, wd_ratio, part)
    return new, part


def _orthogonal(gradient: Array, w: Array, axes: tuple[int, ...], delta: ArrayLike) -> Array:
    """Whether the largest cosine between gradient and kernel is below delta / sqrt(dim); that of zeros is 0."""
    cosines = jnp.abs(inner_product(unit(gradient, axes), unit(w, axes), axes))
    return jnp.max(cosines) < delta / math.sqrt(math.prod(w.shape[axis] for axis in axes))
