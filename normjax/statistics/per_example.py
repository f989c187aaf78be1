"""Statistics that each example has of its own: no branch, so that examples on different devices never wait for another.

`safe_moments` asks of all features at once whether a second pass is due. For statistics of examples that question would
be a collective in layers that need none, and one example far from zero would cost all of them the second pass. Here
the two passes are always taken; a row that was just read is at hand.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from normjax._typing import Mask
from normjax.statistics.reduction import Moments, Reduction, abs2, masked, named
from normjax.statistics.safe_moments import shifted_moments


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def two_pass_moments(how: Reduction, wide: Inexact[Array, "..."], mask: Mask | None) -> Moments:
    """Returns the moments of `wide`, an array in at least float32; those of an empty set are 0.

    The second pass is taken around the mean of the first. Devices that share do so in each of them.
    """
    _, shift = _mean(how, masked(wide, mask), mask)
    # A sum of many numbers far from zero is off by more than their mean's last digit: the second pass mends that, too.
    # Where it is right to 1/512 of a deviation it stands, so that y is what the textbook's formula gives.
    moments, offset, _ = shifted_moments(how, wide, mask, shift)
    return moments._replace(mean=jnp.where(abs2(offset) * 2.0**18 <= moments.var, shift, moments.mean))


@two_pass_moments.defjvp
def _two_pass_moments_jvp(how: Reduction, primals: tuple, tangents: tuple) -> tuple[Moments, Moments]:
    wide, mask = primals
    result = jax.tree.map(named, two_pass_moments(how, wide, mask))
    return result, how.moments_dot(result, wide, mask, tangents[0])


def mean_square(
    how: Reduction, wide: Inexact[Array, "..."], mask: Mask | None
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    r"""Returns how many elements count, and the mean of their squares :math:`\frac1n \sum_i |x_i|^2` (of none: 0)."""
    count, square = _mean(how, abs2(masked(wide, mask)), mask)
    return count, named(square)


def _mean(how: Reduction, x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Returns how many elements count, and their mean; x is zero where it does not count."""
    total, count = how.local_sum(x), how.local_count(x, mask)
    if mask is None:
        (total,), count = how.sharing.sum(total), count * how.sharing.size
    else:
        total, count = how.sharing.sum(total, count)
    return count, total / jnp.maximum(count, 1).astype(total.dtype)
