"""Updates the running mean and variance, which are used at inference."""

from __future__ import annotations

from typing import Any, Never

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from normjax import _checks, _leaves
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import WIDE, BatchStats, DTypeLike, RunningVar, promote
from normjax.statistics.population import POPULATION, is_replaced
from normjax.statistics.spec import Moments

OPTIONS = ("biased", "unbiased")


def init_batch_stats(features: tuple[int, ...], dtype: DTypeLike, *, count: bool) -> BatchStats:
    """Returns mean 0 and variance 1 in at least float32, and the count of batches if `count`."""
    dtype = promote(dtype, jnp.float32)
    batch_stats = {
        "mean": jnp.zeros(features, dtype),
        "var": jnp.ones(features, jnp.finfo(dtype).dtype),
    }
    return batch_stats | ({"count": jnp.zeros((), jnp.int32)} if count else {})


@with_foreign_names
def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | ArrayLike | None = 0.99,
    running_var: RunningVar = "biased",
    skip_nonfinite: bool = False,
    **_foreign: Never,
) -> BatchStats:
    r"""Returns the running statistics after one more batch.

    .. math:: \mu' = m \mu' + (1 - m) \mu, \qquad \sigma'^2 = m \sigma'^2 + (1 - m) s \sigma^2

    where `s = 1` (biased) or `s = n / (n - 1)` (unbiased). With `momentum=None`, the m of the k-th
    batch is `(k - 1) / k`, which gives the mean over all batches.

    Args:
      batch_stats: `mean` and `var`, each `(*features)`, and `count`, an int32 scalar, if
        `momentum=None`. The count may be a float32, as averages of states return it; it is rounded
        to a whole number, and stays a float32.
      moments: moments of the batch, or merged moments of several devices or microbatches.
      momentum: weight of the old value, from 0 to 1; a number or a scalar array. PyTorch's momentum
        is 1 minus this one.
      running_var: "biased" (Flax, Keras) or "unbiased" (PyTorch, Ioffe & Szegedy 2015, Algorithm
        2).
      skip_nonfinite: whether to keep all of `batch_stats` unchanged if the mean or variance of any
        feature is NaN or infinite. By default, such values enter the running statistics, as in
        Flax.

    Returns:
      A dict with the same structure, shapes and dtypes. Features without elements keep their values
      (the unbiased variance requires two elements), and a batch without any element that counts
      does not increase the count.

    Raises:
      ValueError: for `momentum=None` without a count, an unknown `running_var`, or leaves that do
        not fit. TypeError: for running statistics narrower than float32, which would stop changing.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(1)
      >>> microbatches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> a, b = (nj.moments(x, 0) for x in microbatches)
      >>> print(nj.update_batch_stats(batch_stats, nj.merge_moments(a, b), momentum=0.5))
      {'mean': Array([2.], dtype=float32), 'var': Array([3.], dtype=float32)}

    References:
      Ioffe & Szegedy, "Batch Normalization" (2015), section 3.1 and Algorithm 2.
    """
    if _foreign:
        raise_for_foreign(update_batch_stats, _foreign)
    _check(batch_stats, moments, momentum, running_var)
    if skip_nonfinite:
        moments = unless_nonfinite(moments)
    if POPULATION in batch_stats:
        return collect(batch_stats, moments, momentum, running_var)
    return update(batch_stats, moments, momentum, running_var)


def update(
    batch_stats: BatchStats,
    batch: Moments,
    momentum: float | ArrayLike | None,
    running_var: RunningVar,
) -> BatchStats:
    """Updates like `update_batch_stats`, with arguments that are already checked.

    A count that is a Python float is static, so `count > 0` needs no operation.
    """
    count: Any = batch.count
    mean, var = batch.mean, batch.var
    known = isinstance(count, float)
    enough = count > 0
    enough_for_var = enough
    if running_var == "unbiased":
        var = var * (count / (max(count - 1, 1) if known else jnp.maximum(count - 1, 1)))
        enough_for_var = count > 1
    new = {}
    if "count" in batch_stats:
        new["count"] = next_count(batch_stats["count"], enough)
    if momentum is None:
        momentum = 1 - 1 / jnp.maximum(new["count"].astype(var.dtype), 1)
    new["mean"] = _blend(batch_stats["mean"], mean, momentum, enough)
    new["var"] = _blend(batch_stats["var"], var, momentum, enough_for_var)
    return {leaf: new[leaf] for leaf in batch_stats}


def unless_nonfinite(batch: Moments) -> Moments:
    """Returns the moments of a batch, or empty moments if a mean or variance is not finite."""
    finite = jnp.isfinite(batch.mean).all() & jnp.isfinite(batch.var).all()
    return Moments(*(jnp.where(finite, part, 0) for part in batch))


def collect(
    batch_stats: BatchStats,
    batch: Moments,
    momentum: float | ArrayLike | None,
    running_var: RunningVar,
) -> BatchStats:
    """Adds the batch to the collecting leaf; mean and variance do not change."""
    collector: Any = batch_stats[POPULATION]
    return collector.collected(batch_stats, batch, momentum, running_var)


def whole(count: ArrayLike) -> Array:
    """Returns a count of batches as an int, since averaging states (optax) makes it a float."""
    count = jnp.asarray(count)
    is_int = jnp.issubdtype(count.dtype, jnp.integer)
    return count if is_int else jnp.round(count).astype(jnp.int32)


def next_count(old: Array, enough: Any) -> Array:
    """Increases the count if any element of the batch counts, in the dtype of the old count."""
    count = whole(old)
    one_more = jnp.any(enough) & (count < jnp.iinfo(count.dtype).max)
    return (count + one_more.astype(count.dtype)).astype(old.dtype)


def _blend(old: Array, batch: Array, momentum: Any, enough: Any) -> Array:
    """Returns the weighted mean, computed in the batch's precision, in the old value's dtype.

    A value of weight 0 has no effect, although 0 times infinity is NaN.
    """
    if enough is False:
        return old
    wide = old.astype(batch.dtype)
    if not isinstance(momentum, float | int):
        momentum = jnp.asarray(momentum).astype(batch.dtype)
        kept = jnp.where(momentum == 0, 0, momentum * wide)
        new = kept + jnp.where(momentum == 1, 0, (1 - momentum) * batch)
    elif momentum in (0, 1):
        new = wide if momentum else batch
    else:
        new = momentum * wide + (1 - momentum) * batch
    new = new.astype(old.dtype)
    return new if enough is True else jnp.where(enough, new, old)


def _check(
    batch_stats: BatchStats, moments: Moments, momentum: object, running_var: object
) -> None:
    function = "update_batch_stats"
    _leaves.moments(function, moments=moments)
    _checks.choice(function, "running_var", running_var, OPTIONS)
    check_batch_stats(
        function, batch_stats, jnp.shape(moments.mean), jnp.result_type(moments.mean), momentum
    )
    check_precision(function, batch_stats)


def check_precision(function: str, batch_stats: BatchStats) -> None:
    """Raises an error for running statistics that are too imprecise for small updates."""
    if is_replaced(batch_stats):  # checked later, and not updated
        return
    for leaf in ("mean", "var"):
        dtype = jax.typeof(batch_stats[leaf]).dtype
        if dtype not in WIDE:
            _checks.raise_error(
                function,
                f"batch_stats[{leaf!r}] is too imprecise to train with: it would stop changing, or "
                "overflow",
                expected="float32 or wider in training; any float at inference",
                got=f"dtype {dtype}",
                fix="Cast only params, and keep batch_stats in float32",
                kind=TypeError,
            )


def check_batch_stats(
    function: str,
    batch_stats: BatchStats,
    features: tuple[int, ...],
    dtype: DTypeLike,
    momentum: object,
) -> None:
    """Raises an error for running statistics that do not fit features, dtype or momentum."""
    if momentum is not None:
        _checks.between(function, "momentum", momentum, 0.0, 1.0)
    tree = batch_stats
    if isinstance(batch_stats, dict) and POPULATION in batch_stats:
        tree = {leaf: value for leaf, value in batch_stats.items() if leaf != POPULATION}
    _leaves.leaves(
        function,
        "batch_stats",
        tree,
        shape=features,
        dtype=dtype,
        required=("mean", "var"),
        optional=("count",),
    )
    if momentum is None and "count" not in batch_stats:
        _checks.raise_error(
            function,
            "momentum=None needs a count of batches, but batch_stats has no count",
            expected="batch_stats with 'mean', 'var' and 'count'",
            got=f"batch_stats with {sorted(batch_stats)}",
            fix="Make them with batch_norm_init(..., count=True)",
        )
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(batch_stats["mean"]):
        _checks.raise_error(
            function,
            "x is complex, but the running mean is real",
            expected="a complex batch_stats['mean']",
            got=f"batch_stats['mean'].dtype={jnp.asarray(batch_stats['mean']).dtype} for dtype "
            f"{dtype}",
            fix="Make it with batch_norm_init(..., param_dtype=jnp.complex64)",
        )
