"""Measures how far an example's output depends on the other examples in its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from normjax import _checks
from normjax._trees import check_finite
from normjax._typing import PRNGKey, widen
from normjax.diagnostics.instruments._batches import check_examples, check_rows, compiled


class Interactions(NamedTuple):
    """How strongly each example's output depends on each example of the batch.

    Attributes:
      matrix: `(batch, batch)`, the mass of each block of the Jacobian. Row i shows which examples
        the i-th output depends on.
      per_example: `(batch,)`, the share of each row that is off the diagonal.
      off_diagonal: the share of the whole matrix that is off the diagonal: 0 if examples do not
        interact.
      standard_error: the standard error of `off_diagonal`; 0 if it is exact.
    """

    matrix: Float[Array, "batch batch"]
    per_example: Float[Array, " batch"]
    off_diagonal: Float[Array, ""]
    standard_error: Float[Array, ""]


def interactions(
    function: Callable[[Array], Array],
    x: Float[Array, "batch ..."],
    *,
    probes: int | None = None,
    key: PRNGKey | None = None,
) -> Interactions:
    r"""Measures how far examples interact in their batch, by the off-diagonal mass of the Jacobian.

    .. math:: M_{ij} = \left\lVert \frac{\partial y_i}{\partial x_j} \right\rVert_F^2, \qquad
              \text{off-diagonal} = \frac{\sum_{i \ne j} M_{ij}}{\sum_{ij} M_{ij}}

    The share is exactly 0 for a network without batch statistics. For one batch norm after a linear
    map it is about 2/n, since the Jacobian of each feature is :math:`(\delta_{ij} - \frac1n -
    \frac1n \hat x_i \hat x_j) / \sigma`: very little between two of n examples, but not in sum. The
    effects of layers add up.

    The exact matrix takes `batch * min(features of y_i, features of x_j)` derivatives. With
    `probes`, it is estimated without bias from `batch * probes` derivatives, with random signs v
    (Hutchinson's estimator):

    .. math:: M_{ij} = \mathbb{E}_v
              \left\lVert v^\top \frac{\partial y_i}{\partial x_j} \right\rVert^2

    Each entry of the matrix then has a relative standard error of at most
    :math:`\sqrt{2 / \text{probes}}`. The share averages the errors of all entries; its standard
    error is returned.

    Args:
      function: maps a batch to outputs, a row for each example, in *training* mode and without new
        statistics: `lambda x: apply(variables, x, True)[0]`. It is compiled. An nnx module is
        called in its current mode; its statistics do not change.
      x: the batch, floating-point; pass embeddings instead of tokens.
      probes: the number of random sign vectors for each row; None for the exact matrix.
      key: the random key of the signs.

    Returns:
      `Interactions`, in float32, or float64 for such x.

    Raises:
      ValueError: for outputs that are not rows of examples or not finite, and for `probes` without
        `key`.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 4))
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> batch_norm = lambda x: nj.batch_norm(params, batch_stats, x, True)[0]
      >>> found = nj.diagnostics.interactions(batch_norm, x)
      >>> print(f"{found.off_diagonal:.2f}")  # about 2 / 16
      0.12
      >>> layer_norm = lambda x: nj.layer_norm({}, {}, x, True)[0]
      >>> print(nj.diagnostics.interactions(layer_norm, x).off_diagonal)
      0.0

    References:
      Ioffe & Szegedy, "Batch Normalization" (2015), section 3.4: an example is seen in conjunction
      with others. Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990).
    """
    x = check_examples("interactions", "x", x)
    apply = compiled(function)
    y = jax.eval_shape(apply, x)
    check_rows("interactions", "function", y, len(x))
    check_finite("interactions", "function(x)", apply(x))
    if probes is not None:
        samples = _sampled(apply, x, y, probes, _checked(probes, key))
    elif math.prod(y.shape) <= x.size:
        samples = _by_outputs(apply, x, y)[None]
    else:
        samples = _by_inputs(apply, x)[None]
    return _summary(samples)


def _by_outputs(apply: Callable[[Array], Array], x: Array, y: jax.ShapeDtypeStruct) -> Array:
    """Returns the matrix from a pullback for each feature of an output."""
    signs = jnp.eye(math.prod(y.shape[1:]), dtype=y.dtype)
    pull = _pull(apply, x, y)
    return jnp.stack([pull(i, signs).sum(0) for i in range(len(x))])


def _by_inputs(apply: Callable[[Array], Array], x: Array) -> Array:
    """Returns the matrix from a pushforward for each feature of an example."""

    @jax.jit
    def push(j: int, directions: Array) -> Array:
        def one(direction: Array) -> Array:
            tangent = jnp.zeros_like(x).at[j].set(direction.reshape(x.shape[1:]))
            return _masses(jax.jvp(apply, (x,), (tangent,))[1])

        return jax.vmap(one)(directions).sum(0)

    directions = jnp.eye(math.prod(x.shape[1:]), dtype=x.dtype)
    return jnp.stack([push(j, directions) for j in range(len(x))], axis=1)


def _sampled(
    apply: Callable[[Array], Array], x: Array, y: jax.ShapeDtypeStruct, probes: int, key: PRNGKey
) -> Array:
    """Returns an estimate of the matrix for each probe, `(probes, batch, batch)`."""
    signs = jax.random.rademacher(key, (len(x), probes, math.prod(y.shape[1:])), y.dtype)
    pull = _pull(apply, x, y)
    return jnp.stack([pull(i, row) for i, row in enumerate(signs)], axis=1)


def _pull(
    apply: Callable[[Array], Array], x: Array, y: jax.ShapeDtypeStruct
) -> Callable[[int, Array], Array]:
    """Returns a function that maps an example's number and cotangents of its output to masses.

    The masses, of the shape `(cotangents, batch)`, are of the derivatives in each example of x.
    """

    @jax.jit
    def pull(i: int, signs: Array) -> Array:
        _, pullback = jax.vjp(apply, x)

        def one(sign: Array) -> Array:
            cotangent = jnp.zeros(y.shape, y.dtype).at[i].set(sign.reshape(y.shape[1:]))
            return _masses(*pullback(cotangent))

        return jax.vmap(one)(signs)

    return pull


def _masses(derivative: Array) -> Array:
    """Returns the squared norms of the rows."""
    return (widen(derivative).reshape(len(derivative), -1) ** 2).sum(-1)


@jax.jit
def _summary(samples: Array) -> Interactions:
    others = jnp.where(jnp.eye(samples.shape[-1], dtype=bool), 0, samples)
    matrix, rows = samples.mean(0), samples.sum(-1).mean(0)
    share = _share(others.sum(), samples.sum())
    # This is the standard error of a ratio of means, to first order.
    count, totals = len(samples), samples.sum((1, 2))
    squares = (others.sum((1, 2)) - share * totals) ** 2
    variance = squares.sum() / max(count - 1, 1) / count
    error = _share(jnp.sqrt(variance), totals.mean())
    if count == 1:  # the exact matrix
        error = jnp.zeros_like(error)
    return Interactions(matrix, _share(others.sum(-1).mean(0), rows), share, error)


def _share(part: Array, whole: Array) -> Array:
    """Returns part / whole; 0 if the whole is 0."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _checked(probes: int, key: PRNGKey | None) -> PRNGKey:
    """Returns the key; raises an error for too few probes or a missing key."""
    if (_checks.positive_int(probes) or 0) < 2:
        _checks.raise_error(
            "interactions",
            "too few probes for a standard error",
            expected="an int of 2 or more, or None for the exact matrix",
            got=f"probes={probes!r}",
            fix="Start with probes=16",
        )
    if key is None:
        _checks.raise_error(
            "interactions",
            "probes are random, but key is None",
            expected="key=jax.random.key(0), or another",
            got=f"key=None for probes={probes}",
            fix="Pass a key, or leave probes out for the exact matrix",
        )
    return key
