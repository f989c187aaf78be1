"""How much of an example's output is chance: whom it met in its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from normjax import _checks
from normjax._trees import check_finite
from normjax._typing import PRNGKey, widen
from normjax.diagnostics._batches import check_examples, check_rows, compiled


class BatchVariance(NamedTuple):
    """Variances of outputs, means over their features.

    Attributes:
      noise: `(examples,)`, the variance of each example's output over random batches that hold it.
      signal: the variance over examples of the output's mean over batches; an unbiased estimate,
        which may fall below 0 where there is none.
      ratio: the mean noise over the signal; 0 where the batch does not matter.
    """

    noise: Float[Array, " examples"]
    signal: Float[Array, ""]
    ratio: Float[Array, ""]


def batch_variance(
    function: Callable[[Array], Array],
    x: Float[Array, "examples ..."],
    pool: Float[Array, "pool ..."],
    *,
    key: PRNGKey,
    batch_size: int,
    draws: int = 32,
) -> BatchVariance:
    r"""Measures how far an example's output varies with the batch that it is drawn into: batch norm as a regularizer.

    .. math:: y_{eb} = f(x_e \cup B)_e, \qquad
              \text{noise}_e = \mathrm{Var}_B[y_{eb}], \qquad
              \text{signal} = \mathrm{Var}_e[\mathbb{E}_B[y_{eb}]]

    The batches B are `batch_size - 1` other examples, drawn from the pool without repetition and
    anew for each example. Of one batch norm with batches of n, the noise of a feature is about
    :math:`(1 + \hat x^2 / 2) / n` of its variance (in a pool without outliers): the statistics' own
    standard errors. It falls with 1/n, and so does what it
    regularizes: compare `batch_size`s before you change yours.

    Unbiased: the signal is the variance of the means less the noise that is left in them, as in a
      one-way analysis of
    variance. The noise of an example has a relative standard error of about :math:`\sqrt{2 /
    (\text{draws} - 1)}` for a single feature; features and examples average it.

    Args:
      function: from a batch to outputs, a row for each example, in *training* mode; see
        `interactions`.
      x: the examples to look at, 2 or more, floating-point.
      pool: from which the rest of their batches is drawn, without x among it. Let it be large
        against the batch: of a share s of the pool in each batch, the noise is low by the factor 1
          - s.
      key: of the draws.
      batch_size: examples in a batch, the one that is looked at among them.
      draws: batches for each example.

    Returns:
      `BatchVariance`, in float32, or float64 for such x, after `examples * draws` forward passes.

    Raises:
      ValueError: for a pool that is too small or of other shapes, and outputs that are no rows or
        not finite.

    Example:
      >>> import jax, normjax as nj
      >>> x, pool = jax.numpy.split(jax.random.normal(jax.random.key(0), (640, 3)), [128])
      >>> function = lambda x: nj.batch_norm({}, nj.batch_norm_init(3)[1], x, True)[0]
      >>> for batch_size in (8, 32):
      ...     found = nj.diagnostics.batch_variance(function, x, pool, key=jax.random.key(2), batch_size=batch_size)
      ...     print(f"{found.ratio:.2f}")
      0.22
      0.05
      >>> function = lambda x: nj.layer_norm({}, {}, x, True)[0]
      >>> print(nj.diagnostics.batch_variance(function, x, pool, key=jax.random.key(2), batch_size=8).ratio)
      0.0

    References:
      Ioffe & Szegedy, "Batch Normalization" (2015), section 3.4.
      Luo et al., "Towards Understanding Regularization in Batch Normalization" (ICLR 2019).
    """
    x, pool = (
        check_examples("batch_variance", "x", x),
        check_examples("batch_variance", "pool", pool),
    )
    _check_batches(x, pool, batch_size, draws)
    apply = compiled(function)
    check_rows(
        "batch_variance",
        "function",
        jax.eval_shape(apply, jnp.concatenate([x[:1]] * batch_size)),
        batch_size,
    )

    @jax.jit
    def draw(key: PRNGKey) -> Array:
        def one(example: Array, key: PRNGKey) -> Array:
            rows = jax.random.choice(key, len(pool), (batch_size - 1,), replace=False)
            return apply(jnp.concatenate([example[None], pool[rows]]))[0]

        return jax.vmap(one)(x, jax.random.split(key, len(x)))

    y = widen(jnp.stack([draw(own) for own in jax.random.split(key, draws)])).reshape(
        draws, len(x), -1
    )
    check_finite("batch_variance", "function(batch)", y)
    return _summary(y)


@jax.jit
def _summary(y: Array) -> BatchVariance:
    """Variances of outputs `(draws, examples, features)`."""
    noise = _variance(y).mean(-1)
    signal = _variance(y.mean(0)).mean() - noise.mean() / len(y)
    return BatchVariance(noise, signal, jnp.where(noise.mean() > 0, noise.mean() / signal, 0))


def _variance(y: Array) -> Array:
    """Unbiased, along the first axis; exactly 0 for equal values, whatever their mean rounds to."""
    deviations = y - y[:1]
    return deviations.var(0, ddof=1)


def _check_batches(x: Array, pool: Array, batch_size: int, draws: int) -> None:
    for name, given in (("batch_size", batch_size), ("draws", draws)):
        if (_checks.positive_int(given) or 0) < 2:
            _checks.raise_error(
                "batch_variance",
                f"{name} leaves nothing to vary",
                expected="an int of 2 or more",
                got=f"{name}={given!r}",
                fix="Pass the batch_size of your training"
                if name == "batch_size"
                else "Leave draws out for 32",
            )
    if len(x) < 2:
        _checks.raise_error(
            "batch_variance",
            "one example has no variance over examples",
            expected="2 examples or more",
            got=f"x.shape={x.shape}",
            fix="Pass several, of which the first axis is the number",
        )
    if pool.shape[1:] != x.shape[1:] or pool.dtype != x.dtype or len(pool) < batch_size - 1:
        _checks.raise_error(
            "batch_variance",
            "the pool does not fill a batch",
            expected=f"{batch_size - 1} or more examples of shape {x.shape[1:]} and dtype {x.dtype}",
            got=f"pool.shape={pool.shape}, pool.dtype={pool.dtype}",
            fix="Pass a smaller batch_size, or more examples like x",
        )
