"""How primitives are phrased for one compiler: what the formula does not ask for, and XLA does.

Everything here is the identity to mathematics. A program is told apart by the platform that it is
lowered for, never by the one that traces it, so exported programs and ahead-of-time compilation get
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
    """Whether JAX has a single device, so that no array is sharded, whatever the compiler is told.

    Only then is a branch free of communication: its predicate reads values of all examples, which
    over sharded examples is an all-reduce.
    """
    return jax.device_count() == 1
