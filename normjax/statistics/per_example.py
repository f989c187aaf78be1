"""Statistics that each example has of its own: no branch, so that examples on different devices never wait for another.

`safe_moments` asks of all features at once whether a second pass is due. For statistics of examples
that question would be a collective in layers that need none, and one example far from zero would
cost all of them the second pass. Here the two passes are always taken, since a row that was just
read is at hand; but on the CPU of a process that has one device, where the question is free and a
pass is not.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from normjax._typing import Mask
from normjax.statistics.reduction import (
    Moments,
    Reduction,
    abs2,
    apart,
    masked,
    named,
    real_product,
    widen,
)
from normjax.statistics.safe_moments import guarded_moments, shifted_sums
from normjax.statistics.sharing import ALONE, one_device


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def example_moments(
    how: Reduction, x: Inexact[Array, "..."], wide: Inexact[Array, "..."], mask: Mask | None
) -> Moments:
    """Returns the moments of `wide`, which is `x` in at least float32; those of an empty set are 0.

    The second pass is taken around the mean of the first. Devices that share do so in each of them.
    """
    if how.sharing == ALONE and one_device():
        return lax.platform_dependent(
            x, mask, cpu=partial(_if_need_be, how), default=partial(_two_passes, how)
        )
    return _two_passes(how, x, mask)


@example_moments.defjvp
def _example_moments_jvp(
    how: Reduction, primals: tuple, tangents: tuple
) -> tuple[Moments, Moments]:
    x, _, mask = primals
    result = jax.tree.map(named, example_moments(how, *primals))
    x, mean = apart(x, result.mean)
    return result, how.moments_dot(result._replace(mean=mean), x, mask, tangents[1])


def _two_passes(how: Reduction, x: Array, mask: Array | None) -> Moments:
    """The sum of many numbers far from zero is off by more than their mean's last digit: the second pass mends that."""
    (x,) = apart(x)
    _, shift = _mean(how, masked(widen(x), mask), mask)
    (again,) = apart(shift)
    return shifted_sums(how, x, mask, shift, again=again)[0].moments()


def _if_need_be(how: Reduction, x: Array, mask: Array | None) -> Moments:
    """One pass around zero, and a second one where some example's cancelled."""
    sums = jax.eval_shape(lambda x: how.local_sum(widen(x)), x)
    return guarded_moments(how, x, mask, jnp.zeros(sums.shape, sums.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean_square(
    how: Reduction, x: Inexact[Array, "..."], wide: Inexact[Array, "..."], mask: Mask | None
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    r"""Returns how many elements count, and the mean of their squares :math:`\frac1n \sum_i |x_i|^2` (of none: 0)."""
    (x,) = apart(x)
    return _mean(how, abs2(masked(widen(x), mask)), mask)


@mean_square.defjvp
def _mean_square_jvp(how: Reduction, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    x, wide, mask = primals
    count, square = mean_square(how, *primals)
    (x,) = apart(x)
    product = real_product(masked(widen(x), mask), masked(tangents[1], mask))
    (dot,) = how.sharing.sum(how.local_sum(product))
    return (count, named(square)), (jnp.zeros_like(count), 2 * dot / jnp.maximum(count, 1))


def _mean(how: Reduction, x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Returns how many elements count, and their mean; x is zero where it does not count."""
    total, count = how.local_sum(x), how.local_count(x, mask)
    if mask is None:
        (total,), count = how.sharing.sum(total), count * how.sharing.size
    else:
        total, count = how.sharing.sum(total, count)
    return count, total / jnp.maximum(count, 1).astype(total.dtype)
