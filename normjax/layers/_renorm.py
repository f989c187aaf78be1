"""The correction of batch renormalization (Ioffe, 2017), Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from normjax import _checks
from normjax._typing import BatchStats, Params, promote
from normjax.statistics.running import whole

Limit = float | ArrayLike | Callable[[Array], ArrayLike]


def take_limits(r_max: Limit, d_max: Limit, batch_stats: BatchStats) -> tuple[Array, Array]:
    """Returns both limits as scalar arrays; evaluates schedules at the current count."""
    taken = []
    for name, limit, low in (("r_max", r_max, 1.0), ("d_max", d_max, 0.0)):
        if callable(limit):
            if "count" not in batch_stats:
                _checks.raise_error(
                    "batch_renorm",
                    f"{name} is a schedule of the batch count, but batch_stats has no count",
                    expected="batch_stats with 'mean', 'var' and 'count'",
                    got=f"batch_stats with {sorted(batch_stats)}",
                    fix="Make them with batch_renorm_init(...)",
                )
            limit = limit(whole(batch_stats["count"]))
        _checks.between("batch_renorm", name, limit, low, math.inf, finite=False)
        limit = jnp.asarray(limit)
        if limit.shape != ():
            _checks.raise_error(
                "batch_renorm",
                f"{name} is not a scalar",
                expected="a number, a scalar array or a schedule that returns one",
                got=f"shape {limit.shape}",
                fix="Reduce it to one number for all features",
            )
        taken.append(limit)
    return taken[0], taken[1]


def correct(
    params: Params,
    batch: tuple[Array, Array],
    running: tuple[Array, Array],
    limits: tuple[Array, Array],
    epsilon: float,
) -> Params:
    r"""Returns scale and bias that correct batch statistics towards the running statistics.

    .. math:: r = \operatorname{clip}\left(\frac{\sigma_B}{\sigma}, \frac1{r_{max}},
              r_{max}\right), \qquad
              d = \operatorname{clip}\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    Gradients treat r and d as constants. Scale and bias become `scale * r` and `scale * d + bias`.

    Args:
      params: with the rank of x.
      batch: mean and variance of the batch, with the rank of x.
      running: running mean and variance, with the rank of x.
      limits: r_max and d_max.
      epsilon: added to both variances.
    """
    dtype = batch[1].dtype
    (mean, var), (running_mean, running_var) = lax.stop_gradient((batch, running))
    r_max, d_max = (lax.stop_gradient(limit).astype(dtype) for limit in limits)
    inverse = lax.rsqrt(running_var.astype(dtype) + epsilon)
    r = jnp.clip(jnp.sqrt(var + epsilon) * inverse, 1 / r_max, r_max)
    d = (mean - running_mean.astype(mean.dtype)) * inverse.astype(mean.dtype)
    d = d * jnp.minimum(1, d_max / jnp.maximum(jnp.abs(d), jnp.finfo(dtype).tiny)).astype(d.dtype)
    leaves = {"scale": jnp.ones((), dtype), "bias": jnp.zeros((), dtype)} | params
    dtype = promote(d.dtype, *(leaf.dtype for leaf in leaves.values()))
    scale, bias, r, d = (part.astype(dtype) for part in (leaves["scale"], leaves["bias"], r, d))
    return {"scale": scale * r, "bias": scale * d + bias}
