"""Spectral normalization (Miyato et al., 2018)."""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any, NamedTuple, Never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax import _checks, _leaves
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import Axes, BatchStats, DTypeLike, Kernel, Params, PRNGKey, widen
from normjax.layers.jit_step import jit_step
from normjax.platforms.plain import PLAIN
from normjax.statistics.devices import pcast_like
from normjax.statistics.elements import abs2


@with_foreign_names
def spectral_norm_init(
    kernel: Kernel,
    *,
    key: PRNGKey,
    feature_axes: Axes = -1,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns `{}` and the initial state of the power iteration of `spectral_norm`.

    Args:
      kernel: of any rank >= 1.
      key: random key for the initial vector u.
      feature_axes: the axes that form the columns of the matrix.

    Returns:
      An empty `params`; and `batch_stats`: a dict of `u` (a random unit vector, `(1, features)`)
      and `sigma` (1). Both are in at least float32.

    Raises:
      ValueError, TypeError: for axes or a dtype that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> kernel, key = jnp.ones((3, 3, 8, 16)), jax.random.key(0)
      >>> params, batch_stats = nj.weights.spectral_norm_init(kernel, key=key)
      >>> print(params, batch_stats["u"].shape, batch_stats["sigma"])
      {} (1, 16) 1.0
    """
    if _foreign:
        raise_for_foreign(spectral_norm_init, _foreign)
    function = "spectral_norm_init"
    kernel = _real(function, kernel)
    columns = _columns(kernel, _checks.axes(function, "feature_axes", feature_axes, kernel.shape))
    u = jax.random.normal(key, (1, columns), widen(kernel).dtype)
    return {}, {"u": _direction(u, u, 0.0), "sigma": jnp.ones((), u.dtype)}


@jax.named_scope("spectral_norm")
@with_foreign_names
def spectral_norm(
    params: Params,
    batch_stats: BatchStats,
    kernel: Kernel,
    train: bool,
    *,
    feature_axes: Axes = -1,
    n_steps: int = 1,
    bound: float | None = None,
    epsilon: float = 1e-12,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Kernel, BatchStats]:
    r"""Divides a kernel by its largest singular value, which power iteration estimates.

    .. math:: v = \frac{u W^\top}{\lVert u W^\top \rVert}, \quad
              u = \frac{v W}{\lVert v W \rVert}, \quad
              \sigma = v W u^\top, \quad w = \frac{W}{\sigma}

    where W is the kernel as a matrix with one column per feature. It bounds the Lipschitz constant
    of a layer: use it in the discriminators of GANs, and in networks that must be Lipschitz.
    Gradients treat u and v as constants. With a bound c, only kernels with a larger singular value
    are divided, and smaller ones stay as they are:

    .. math:: w = \frac{W}{\max(1, \sigma / c)}

    Args:
      params: `{}`.
      batch_stats: dict of `u`, `(1, features)`, and `sigma`, a scalar.
      kernel: W, real, of any rank >= 1. It is not changed.
      train: Python bool. Training returns the new u and sigma. Inference iterates from the stored
        u, too, but does not store the result, so it is deterministic.
      feature_axes: the axes that form the columns of the matrix; all others form its rows.
      n_steps: number of power iteration steps in each call.
      bound: c, the upper bound of the largest singular value of w, such as 0.95 in SNGP; must be
        positive. With None, every kernel is scaled to a largest singular value of 1.
      epsilon: added to the squared norms of vectors, which are first scaled to a largest element of
        1.
      dtype: dtype of w; None for the dtype of the kernel.

    Returns:
      `w`, with the shape of the kernel, and the `batch_stats`, which are updated in training. A
      kernel whose sigma is 0 is returned unchanged. w is computed in at least float32 and rounded
      once.

    Raises:
      ValueError, TypeError: at trace time, for axes, leaves or dtypes that do not fit, an `n_steps`
        below 1, or a bound that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> kernel = jnp.diag(jnp.array([5.0, 1.0]))
      >>> params, batch_stats = nj.weights.spectral_norm_init(kernel, key=jax.random.key(0))
      >>> spectral_norm = nj.weights.spectral_norm
      >>> w, batch_stats = spectral_norm(params, batch_stats, kernel, train=True, n_steps=10)
      >>> print(batch_stats["sigma"].round(3), w.round(3).diagonal())
      5.0 [1.  0.2]

    References:
      Miyato, Kataoka, Koyama & Yoshida, "Spectral Normalization for Generative Adversarial
      Networks" (ICLR 2018), Algorithm 1. With a bound: Liu et al., "Simple and Principled
      Uncertainty Estimation with Deterministic Deep Learning via Distance Awareness" (SNGP,
      NeurIPS 2020), eq. 8.
    """
    if _foreign:
        raise_for_foreign(spectral_norm, _foreign)
    function = "spectral_norm"
    train = _checks.static_train(function, train)
    kernel = _real(function, kernel)
    kept = _checks.axes(function, "feature_axes", feature_axes, kernel.shape)
    _leaves.leaves(function, "params", params, shape=(), dtype=kernel.dtype)
    _leaves.leaves(
        function,
        "batch_stats",
        batch_stats,
        shape=(1, _columns(kernel, kept)),
        dtype=kernel.dtype,
        required=("u", "sigma"),
    )
    epsilon = _checks.number(function, "epsilon", epsilon, 0.0, math.inf)
    steps = _checks.positive_int(n_steps)
    if steps is None:
        _checks.raise_error(
            function,
            "n_steps is not a positive int",
            expected="1 or more",
            got=f"n_steps={n_steps!r}",
            fix="Use 1",
        )
    bound = _check_bound(function, bound)
    plan = _Plan(kept, steps, bound, epsilon, _checks.output_dtype(function, dtype, kernel))
    if not kernel.size:
        return kernel.astype(plan.dtype), batch_stats
    w, u, sigma = _spectral_norm(jnp.asarray(batch_stats["u"]), kernel, plan)
    if not train:
        return w, batch_stats
    new = {"u": u, "sigma": sigma}
    return w, {leaf: new[leaf].astype(old.dtype) for leaf, old in batch_stats.items()}


def forget_kernels_of_zeros(batch_stats: BatchStats) -> BatchStats:
    """Returns the state as Flax stores it, with u = 0 for kernels of zeros."""
    return batch_stats | {"u": jnp.where(batch_stats["sigma"] == 0, 0, batch_stats["u"])}


class _Plan(NamedTuple):
    """The static arguments of a step."""

    feature_axes: tuple[int, ...]
    n_steps: int
    bound: float | None
    epsilon: float
    dtype: Any


@partial(jit_step, like=("kernel", "u", "sigma"))
def _spectral_norm(u: Array, kernel: Array, plan: _Plan) -> tuple[Array, Array, Array]:
    wide = widen(kernel)
    matrix = jnp.moveaxis(wide, plan.feature_axes, range(-len(plan.feature_axes), 0)).reshape(
        -1, u.shape[-1]
    )
    fixed = lax.stop_gradient(matrix)

    def iterate(_: int, vectors: tuple[Array, Array]) -> tuple[Array, Array]:
        v, u = vectors
        v = _direction(_dot(u, fixed.T), v, plan.epsilon)
        return v, _direction(_dot(v, fixed), u, plan.epsilon)

    u, v = lax.stop_gradient(u).astype(wide.dtype), jnp.zeros((1, matrix.shape[0]), wide.dtype)
    # Under shard_map, the carry of a loop must vary over the same mapped axes before and after.
    (u,) = pcast_like(fixed, u)
    (v,) = pcast_like(u, v)
    start = v, u
    if PLAIN.value:
        v, u = reduce(lambda vectors, step: iterate(step, vectors), range(plan.n_steps), start)
    else:
        v, u = lax.fori_loop(0, plan.n_steps, iterate, start)
    sigma = jnp.sum(_dot(v, matrix) * u)
    w = _divided(wide, sigma, plan.bound)
    return w.astype(plan.dtype), u, lax.stop_gradient(sigma)


def _divided(kernel: Array, sigma: Array, bound: float | None) -> Array:
    """Returns the kernel with a largest singular value of 1, or of at most the bound."""
    if bound is not None:
        return kernel / jnp.where(sigma > bound, sigma / bound, 1)
    # The derivative of a quotient contains 1 / sigma^2, which overflows for sigma below 1e-20.
    unit = _to_invert(sigma)
    return kernel * unit / (jnp.where(sigma == 0, 1, sigma) * unit)


def _to_invert(sigma: Array) -> Array:
    """Returns a power of two that brings sigma into the range where 1 / sigma^2 is finite."""
    size = jnp.abs(lax.stop_gradient(sigma))
    return jnp.where(size < 1e-12, 2.0**80, jnp.where(size > 1e12, 2.0**-80, 1.0)).astype(
        size.dtype
    )


def _dot(a: Array, b: Array) -> Array:
    """Multiplies matrices in full float32; accelerators use a lower precision by default."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _direction(vector: Array, otherwise: Array, epsilon: float) -> Array:
    """Returns the vector with norm 1, without overflow or underflow; `otherwise` for zeros."""
    if not vector.size:
        return otherwise
    largest = jnp.max(jnp.abs(vector))
    known = largest > 0
    vector = vector / jnp.where(known, largest, 1)
    return jnp.where(known, vector * lax.rsqrt(jnp.sum(abs2(vector)) + epsilon), otherwise)


def _columns(kernel: Array, feature_axes: tuple[int, ...]) -> int:
    return math.prod(kernel.shape[axis] for axis in feature_axes)


def _check_bound(function: str, bound: float | None) -> float | None:
    """Returns the bound; raises an error unless it is positive."""
    if bound is None:
        return None
    bound = _checks.number(function, "bound", bound, 0.0, math.inf)
    if bound == 0:
        _checks.raise_error(
            function,
            "a bound of 0 makes every kernel 0",
            expected="bound above 0, or None",
            got=f"bound={bound!r}",
            fix="Use 0.95, as SNGP does",
        )
    return bound


def _real(function: str, kernel: Kernel) -> Array:
    kernel = _checks.activations(function, kernel, "kernel")
    if jnp.iscomplexobj(kernel):
        _checks.raise_error(
            function,
            "the kernel is complex",
            expected="a real kernel",
            got=f"kernel.dtype={kernel.dtype} for kernel.shape={kernel.shape}",
            fix="Normalize its real form [[a, -b], [b, a]]",
            kind=TypeError,
        )
    return kernel
