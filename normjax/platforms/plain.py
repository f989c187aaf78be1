"""The form of the layers that exporters and other interpreters of jaxprs understand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import jax

JET = "jax.experimental.jet"

# Whether to trace to elementary operations only. It is part of the cache key of `jax.jit`, so a
# function is traced again if it changes.
PLAIN = jax.make_user_context(False)


def plain_phrasing() -> AbstractContextManager[None]:
    """Returns a context in which the layers are traced to elementary operations only.

    Use it to pass a network to a program that reads jaxprs and supports only common primitives: an
    exporter (`jax2onnx`), an interpreter (`jax.experimental.jet`) or your own compiler. In this
    context, layers use no branches, loops, checkpoints, names, optimization barriers,
    platform-dependent code or custom derivative rules. The values are the same up to rounding.
    Training also works, but is not optimized: variances take two passes over x, and gradients are
    derived from the formula, which stores more arrays of x's size for the backward pass and
    underflows earlier (standard deviations beyond 1e12 in float32).

    It takes effect when a function is traced, in this thread. `jax.jit` traces a function again in
    this context, and caches both versions separately.

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
    """Returns whether to trace so: on request, or under jet, which cannot run derivative rules."""
    if PLAIN.value:
        return True
    if JET not in sys.modules:
        return False
    return any(type(leaf).__module__ == JET for leaf in jax.tree.leaves(operands))


def custom_jvp(function: Callable[..., Any], nondiff_argnums: tuple[int, ...] = ()) -> Any:
    """Like `jax.custom_jvp`, but in the plain form the function has no custom rule."""
    with_rule = jax.custom_jvp(function, nondiff_argnums=nondiff_argnums)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments) if PLAIN.value else with_rule(*arguments)

    call.defjvp = with_rule.defjvp  # type: ignore[attr-defined]
    return call
