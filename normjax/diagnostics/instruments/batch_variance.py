"""Measures how far an example's output varies with the batch that it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from normjax import _checks
from normjax._trees import check_finite
from normjax._typing import PRNGKey, widen
from normjax.diagnostics.instruments._batches import check_examples, check_rows, compiled


class BatchVariance(NamedTuple):
    """Variances of outputs, averaged over features.

    Attributes:
      noise: `(examples,)`, the variance of each example's output over random batches that contain
        the example.
      signal: the variance, over examples, of the mean output over batches. It is an unbiased
        estimate, so it may be below 0 if the true variance is near 0.
      ratio: the mean noise divided by the signal; 0 if outputs do not depend on the batch.
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
    r"""Measures how far an example's output varies with its batch: the noise of batch norm.

    .. math:: y_{eb} = f(x_e \cup B)_e, \qquad
              \text{noise}_e = \mathrm{Var}_B[y_{eb}], \qquad
              \text{signal} = \mathrm{Var}_e[\mathbb{E}_B[y_{eb}]]

    Each batch B has `batch_size - 1` other examples, which are drawn from the pool without
    repetition, anew for each example. With one batch norm and batches of n, the noise of a feature
    is about :math:`(1 + \hat x^2 / 2) / n` of its variance (in a pool without outliers), because
    of the standard errors of the statistics. The noise falls with 1/n, and so does the
    regularization by it: compare several `batch_size`s before you change yours.

    The estimates are unbiased: the signal is the variance of the means minus the noise that is left
    in them, as in a one-way analysis of variance. The noise of an example has a relative standard
    error of about :math:`\sqrt{2 / (\text{draws} - 1)}` for a single feature; the mean over
    features and examples has a smaller one.

    Args:
      function: maps a batch to outputs, a row for each example, in *training* mode; see
        `interactions`.
      x: the examples whose outputs are measured, 2 or more, floating-point.
      pool: other examples, from which the rest of each batch is drawn. It should be large relative
        to the batch: if each batch has a share s of the pool, the noise is too low by the factor
        1 - s.
      key: the random key of the draws.
      batch_size: the number of examples in a batch, including the one that is measured.
      draws: the number of batches for each example.

    Returns:
      `BatchVariance`, in float32, or float64 for such x, after `examples * draws` forward passes.

    Raises:
      ValueError: for a pool that is too small or of other shapes, and for outputs that are not rows
        or not finite.

    Example:
      >>> import jax, normjax as nj
      >>> x, pool = jax.numpy.split(jax.random.normal(jax.random.key(0), (640, 3)), [128])
      >>> function = lambda x: nj.batch_norm({}, nj.batch_norm_init(3)[1], x, True)[0]
      >>> def ratio(function, batch_size):
      ...     draws = {"key": jax.random.key(2), "batch_size": batch_size}
      ...     return nj.diagnostics.batch_variance(function, x, pool, **draws).ratio
      >>> print(f"{ratio(function, 8):.2f} {ratio(function, 32):.2f}")
      0.22 0.05
      >>> print(ratio(lambda x: nj.layer_norm({}, {}, x, True)[0], 8))
      0.0

    References:
      Ioffe & Szegedy, "Batch Normalization" (2015), section 3.4.
      Luo et al., "Towards Understanding Regularization in Batch Normalization" (ICLR 2019).
    """
    x = check_examples("batch_variance", "x", x)
    pool = check_examples("batch_variance", "pool", pool)
    _check_batches(x, pool, batch_size, draws)
    apply = compiled(function)
    shape = jax.eval_shape(apply, jnp.concatenate([x[:1]] * batch_size))
    check_rows("batch_variance", "function", shape, batch_size)

    @jax.jit
    def draw(key: PRNGKey) -> Array:
        def one(example: Array, key: PRNGKey) -> Array:
            rows = jax.random.choice(key, len(pool), (batch_size - 1,), replace=False)
            return apply(jnp.concatenate([example[None], pool[rows]]))[0]

        return jax.vmap(one)(x, jax.random.split(key, len(x)))

    outputs = jnp.stack([draw(own) for own in jax.random.split(key, draws)])
    y = widen(outputs).reshape(draws, len(x), -1)
    check_finite("batch_variance", "function(batch)", y)
    return _summary(y)


@jax.jit
def _summary(y: Array) -> BatchVariance:
    """Returns the variances of outputs `(draws, examples, features)`."""
    noise = _variance(y).mean(-1)
    signal = _variance(y.mean(0)).mean() - noise.mean() / len(y)
    return BatchVariance(noise, signal, jnp.where(noise.mean() > 0, noise.mean() / signal, 0))


def _variance(y: Array) -> Array:
    """Returns the unbiased variance along the first axis, which is exactly 0 for equal values."""
    deviations = y - y[:1]
    return deviations.var(0, ddof=1)


def _check_batches(x: Array, pool: Array, batch_size: int, draws: int) -> None:
    _check_counts(batch_size, draws)
    if len(x) < 2:
        _checks.raise_error(
            "batch_variance",
            "one example has no variance over examples",
            expected="2 examples or more",
            got=f"x.shape={x.shape}",
            fix="Pass several, along the first axis",
        )
    if pool.shape[1:] != x.shape[1:] or pool.dtype != x.dtype or len(pool) < batch_size - 1:
        _checks.raise_error(
            "batch_variance",
            "the pool does not fill a batch",
            expected=f"{batch_size - 1} or more examples of shape {x.shape[1:]}, dtype {x.dtype}",
            got=f"pool.shape={pool.shape}, pool.dtype={pool.dtype}",
            fix="Pass a smaller batch_size, or more examples like x",
        )


def _check_counts(batch_size: int, draws: int) -> None:
    for name, given in (("batch_size", batch_size), ("draws", draws)):
        if (_checks.positive_int(given) or 0) < 2:
            of_training = "Pass the batch_size of your training"
            _checks.raise_error(
                "batch_variance",
                f"{name} is too small for a variance",
                expected="an int of 2 or more",
                got=f"{name}={given!r}",
                fix=of_training if name == "batch_size" else "Leave draws out for 32",
            )
