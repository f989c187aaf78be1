"""The phrasing that any reader of jaxprs can take, for exporters and other interpreters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import jax

JET = "jax.experimental.jet"

# Whether to trace to elementary operations alone. Part of the key by which `jax.jit` keeps what it
# traced: a function is traced anew under it.
PLAIN = jax.make_user_context(False)


def plain_phrasing() -> AbstractContextManager[None]:
    """Returns a context in which the layers are traced to elementary operations alone.

    Use it to hand a network to a program that reads jaxprs and knows the usual primitives only: an
    exporter (`jax2onnx`), an interpreter (`jax.experimental.jet`), a compiler of your own. Under it
    no layer makes a branch, a loop, a checkpoint, a name, an optimization barrier, a choice of the
    platform or a rule for its derivative. The values are the same up to rounding. Training is right
    too, but made for no compiler: variances take two passes over x, and gradients are derived from
    the formula, which keeps more arrays of x's size for the backward pass and underflows earlier
    (deviations beyond 1e12 in float32).

    It acts where a function is traced, in this thread. `jax.jit` traces a function again under it,
    so a function that was compiled before is not mixed up with the plain one.

    Returns:
      A context manager.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> from jax.experimental.jet import jet
      >>> layer = lambda x: nj.rms_norm({}, {}, x, train=False)[0]
      >>> x, direction = jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])
      >>> with nj.plain_phrasing():
      ...     y, (first, second) = jet(layer, (x,), ([direction, jnp.zeros(2)],))
      >>> print((1000 * jnp.stack([y, first, second])).round())
      [[ 849. 1131.]
       [ 181. -136.]
       [ -65.    4.]]
    """
    return PLAIN(True)


def is_plain_for(operands: Any) -> bool:
    """Whether to trace so: on request, or for jet, whose tracers leak from rules of derivatives."""
    if PLAIN.value:
        return True
    if JET not in sys.modules:
        return False
    return any(type(leaf).__module__ == JET for leaf in jax.tree.leaves(operands))


def custom_jvp(function: Callable[..., Any], nondiff_argnums: tuple[int, ...] = ()) -> Any:
    """`jax.custom_jvp`, but for the plain phrasing, where the function has no rule of its own."""
    with_rule = jax.custom_jvp(function, nondiff_argnums=nondiff_argnums)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if PLAIN.value else with_rule(*arguments)

    call.defjvp = with_rule.defjvp  # type: ignore[attr-defined]
    return call
