"""The momentum for which running statistics equal Haiku's bias-corrected averages."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from normjax import _checks


def haiku_momentum(decay_rate: float, count: ArrayLike) -> Float[Array, ""]:
    r"""Returns the momentum for which the next update equals Haiku's.

    .. math:: m = \frac{d (1 - d^t)}{1 - d^{t + 1}}

    where d is the decay rate and t the number of steps so far. The momentum is 0 at the first step
    and converges to d, since Haiku starts its averages at zero and corrects the bias.

    Args:
      decay_rate: the argument of `hk.BatchNorm`, from 0 to less than 1.
      count: the number of steps so far: `batch_stats["count"]`.

    Returns:
      A scalar to pass as `momentum`, float32.

    Raises:
      ValueError: if the decay rate is out of range.

    Example:
      >>> import normjax as nj
      >>> print(*(f"{nj.convert.haiku_momentum(0.5, count):.3f}" for count in (0, 1, 2, 50)))
      0.000 0.333 0.429 0.500

    References:
      Kingma & Ba, "Adam" (2015), section 3, on which `hk.ExponentialMovingAverage` is modelled.
    """
    check_decay_rate("haiku_momentum", decay_rate)
    steps = jnp.asarray(count, jnp.float32)
    # 1 - d^t by expm1, which is accurate even if d is near 1 and t is small.
    left = -jnp.expm1(steps * np.log(decay_rate)) if decay_rate else jnp.sign(steps)
    more = -jnp.expm1((steps + 1) * np.log(decay_rate)) if decay_rate else jnp.ones_like(steps)
    return decay_rate * left / more


def check_decay_rate(function: str, decay_rate: float) -> None:
    """Raises an error for a decay rate for which Haiku cannot correct its averages."""
    if not 0 <= decay_rate < 1:
        _checks.raise_error(
            function,
            "decay_rate is out of range",
            expected="0 <= decay_rate < 1",
            got=f"decay_rate={decay_rate!r}",
            fix="Pass the decay_rate of hk.BatchNorm",
        )
