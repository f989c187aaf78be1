"""How far an example's output depends on the other examples of its batch."""

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
from normjax.diagnostics._batches import check_examples, check_rows, compiled


class Interactions(NamedTuple):
    """How strongly each example's output depends on each example of the batch.

    Attributes:
      matrix: `(batch, batch)`, the mass of each block of the Jacobian: row i says whom the i-th
        output depends on.
      per_example: `(batch,)`, the share of a row that lies off the diagonal.
      off_diagonal: that share of the whole matrix: 0 where examples do not interact.
      standard_error: of `off_diagonal`; 0 where it is exact.
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

    It is exactly 0 for a network without batch statistics. Of one batch norm behind a linear map,
    whose Jacobian is :math:`(\delta_{ij} - \frac1n - \frac1n \hat x_i \hat x_j) / \sigma` for each
    feature, it is about 2/n: nearly nothing between any two of n examples, but something for all.
      Layers add up.

    Exactly, by `batch * min(features of y_i, features of x_j)` derivatives. With `probes`,
    estimated without bias by `batch * probes` of them, with random signs v (Hutchinson's
    estimator):

    .. math:: M_{ij} = \mathbb{E}_v \left\lVert v^\top \frac{\partial y_i}{\partial x_j} \right\rVert^2

    A block of the matrix has a relative standard error of at most :math:`\sqrt{2 / \text{probes}}`;
    that of the share, whose errors are averaged over all blocks, is returned.

    Args:
      function: from a batch to outputs, a row for each example, in *training* mode; new statistics
        are to be left out:
        `lambda x: apply(variables, x, True)[0]`. It is compiled. An nnx module is called in the
          mode that it is in, and
        keeps its statistics.
      x: the batch, floating-point; in place of tokens pass their embeddings.
      probes: how many random signs a row is estimated with; None for the exact matrix.
      key: for `probes`.

    Returns:
      `Interactions`, in float32, or float64 for such x.

    Raises:
      ValueError: for outputs that are no rows of examples or not finite, and for `probes` without
        `key`.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 4))
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> found = nj.diagnostics.interactions(lambda x: nj.batch_norm(params, batch_stats, x, True)[0], x)
      >>> print(f"{found.off_diagonal:.2f}")  # about 2 / 16
      0.12
      >>> print(nj.diagnostics.interactions(lambda x: nj.layer_norm({}, {}, x, True)[0], x).off_diagonal)
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
    """The matrix row by row: a pullback for each feature of an output."""
    signs = jnp.eye(math.prod(y.shape[1:]), dtype=y.dtype)
    pull = _pull(apply, x, y)
    return jnp.stack([pull(i, signs).sum(0) for i in range(len(x))])


def _by_inputs(apply: Callable[[Array], Array], x: Array) -> Array:
    """The matrix column by column: a pushforward for each feature of an example."""

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
    """An estimate of the matrix for each probe, `(probes, batch, batch)`."""
    signs = jax.random.rademacher(key, (len(x), probes, math.prod(y.shape[1:])), y.dtype)
    pull = _pull(apply, x, y)
    return jnp.stack([pull(i, row) for i, row in enumerate(signs)], axis=1)


def _pull(
    apply: Callable[[Array], Array], x: Array, y: jax.ShapeDtypeStruct
) -> Callable[[int, Array], Array]:
    """From an example and cotangents of its output to the masses `(cotangents, batch)` that they find in x."""

    @jax.jit
    def pull(i: int, signs: Array) -> Array:
        _, pullback = jax.vjp(apply, x)

        def one(sign: Array) -> Array:
            return _masses(
                *pullback(jnp.zeros(y.shape, y.dtype).at[i].set(sign.reshape(y.shape[1:])))
            )

        return jax.vmap(one)(signs)

    return pull


def _masses(derivative: Array) -> Array:
    """Squared norms of its rows."""
    return (widen(derivative).reshape(len(derivative), -1) ** 2).sum(-1)


@jax.jit
def _summary(samples: Array) -> Interactions:
    others = jnp.where(jnp.eye(samples.shape[-1], dtype=bool), 0, samples)
    matrix, rows = samples.mean(0), samples.sum(-1).mean(0)
    share = _share(others.sum(), samples.sum())
    # Of a ratio of means, to first order.
    totals = samples.sum((1, 2))
    variance = (
        ((others.sum((1, 2)) - share * totals) ** 2).sum() / max(len(samples) - 1, 1) / len(samples)
    )
    error = _share(jnp.sqrt(variance), totals.mean())
    exact = len(samples) == 1
    return Interactions(
        matrix,
        _share(others.sum(-1).mean(0), rows),
        share,
        jnp.zeros_like(error) if exact else error,
    )


def _share(part: Array, whole: Array) -> Array:
    """The ratio; 0 where nothing depends on anything."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _checked(probes: int, key: PRNGKey | None) -> PRNGKey:
    """Returns the key; refuses too few probes, and none to draw them with."""
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
            "probes are random, and there is no key",
            expected="key=jax.random.key(0), or another",
            got=f"key=None for probes={probes}",
            fix="Pass a key, or leave probes out for the exact matrix",
        )
    return key
