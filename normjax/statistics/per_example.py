"""Statistics that each example has of its own: no branch, so that examples on different devices never wait for another.

`safe_moments` asks of all features at once whether a second pass is due. For statistics of examples that question would
be a collective in layers that need none, and one example far from zero would cost all of them the second pass. Here
the two passes are always taken; a row that was just read is at hand.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from normjax._typing import Mask
from normjax.statistics.moments import merge_stacked
from normjax.statistics.reduction import Moments, Reduction, abs2, masked, named
from normjax.statistics.sharing import vary_like


def two_pass_moments(wide: Inexact[Array, "..."], how: Reduction, mask: Mask | None = None) -> Moments:
    """Returns the moments of `wide`, an array in at least float32; those of an empty set are 0.

    Devices that share compute moments of their own and merge them: one collective forward and one backward.
    """
    return _two_pass_moments(how, wide, mask)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _two_pass_moments(how: Reduction, wide: Array, mask: Array | None) -> Moments:
    count = how.local_count(wide, mask)
    n = jnp.maximum(count, 1)
    mean = jnp.sum(masked(wide, mask), how.axes) / n.astype(wide.dtype)
    var = jnp.sum(masked(abs2(wide - how.expand(mean)), mask), how.axes) / n
    local = Moments(jnp.broadcast_to(count, var.shape), mean, var)
    if not how.sharing.axis_name:
        return local
    return merge_stacked(Moments(*how.sharing.gather(*local)))


@_two_pass_moments.defjvp
def _two_pass_moments_jvp(how: Reduction, primals: tuple, tangents: tuple) -> tuple[Moments, Moments]:
    wide, mask = primals
    result = jax.tree.map(named, _two_pass_moments(how, wide, mask))
    count_dot, mean_dot, var_dot = how.moments_dot(result, wide, mask, tangents[0])
    # The gathered moments count as varying over the devices; their summed derivatives do not yet.
    mean_dot, var_dot = vary_like(result.mean, mean_dot, var_dot)
    return result, Moments(count_dot, mean_dot, var_dot)


def mean_square(
    wide: Inexact[Array, "..."], how: Reduction, mask: Mask | None = None
) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
    r"""Returns how many elements count, and the mean of their squares :math:`\frac1n \sum_i |x_i|^2` (of none: 0)."""
    squares = jnp.sum(abs2(masked(wide, mask)), how.axes)
    count = jnp.broadcast_to(how.local_count(wide, mask), squares.shape)
    if mask is None:
        (squares,), count = how.sharing.sum(squares), count * how.sharing.size
    else:
        squares, count = how.sharing.sum(squares, lax.stop_gradient(count))
    return count, named(squares / jnp.maximum(count, 1))
