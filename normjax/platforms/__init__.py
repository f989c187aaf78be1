"""Phrases primitives for one compiler, where XLA needs more than the formula.

Mathematically, everything here is the identity. The phrasing depends on the platform that a program
is lowered for, not on the one that traces it, so exported and ahead-of-time compiled programs get
the phrasing of the platform that they run on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from normjax.platforms.plain import is_plain


def on_cpu(cpu: Callable[..., Any], elsewhere: Callable[..., Any], *operands: Any) -> Any:
    """Returns `cpu(*operands)` in programs for CPUs, `elsewhere(*operands)` in all others."""
    if is_plain():
        return elsewhere(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=elsewhere)


def one_device() -> bool:
    """Returns whether JAX has a single device, so that no array is sharded.

    Only then is a branch free of communication: its predicate reads values of all examples, which
    over sharded examples is an all-reduce.
    """
    return jax.device_count() == 1
