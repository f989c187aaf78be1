"""Which parameters an optimizer decays, found by asking it for updates without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from normjax import _checks
from normjax.diagnostics._findings import Finding
from normjax.diagnostics._lint.graph import Unknown
from normjax.diagnostics._lint.model import FUNCTION
from normjax.diagnostics._lint.network import Network

STEPS = 100  # at most: some start with a rate of 0, and some collect gradients first
NOTHING = 1e-13  # of a parameter of 1, in float64


def decayed_scales(network: Network, optimizer: Any, params: PyTree) -> Iterator[Finding]:
    """Yields normalizations whose scale or bias an optimizer decays."""
    names = [leaf for leaf, name in network.leaves.items() if name.collection == "params"]
    decayed = {
        leaf
        for leaf, moves in zip(names, jax.tree.leaves(decays(optimizer, params)), strict=True)
        if moves
    }
    for norm in network.norms:
        hit = sorted(norm.leaves & decayed)
        try:
            harmless = bool(norm.factors) and all(
                bool(jnp.any(f != 0)) for f in network.factors(norm, zeros=True)
            )
        except Unknown:
            harmless = False
        if hit and not harmless:
            yield Finding(
                network.path(norm),
                "decayed-scale",
                "warning",
                f"the optimizer decays its {' and '.join(repr(network.leaves[leaf].name) for leaf in hit)}",
                "leave scales and biases out: mask=nj.optim.decay_mask in optax.adamw or optax.add_decayed_weights",
            )


def decays(optimizer: Any, params: PyTree) -> PyTree[bool]:
    """Returns which parameters change without a gradient, and the more, the larger they are."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        _checks.raise_error(
            FUNCTION,
            "optimizer is no optax transformation",
            expected="a pair of init and update, such as optax.adamw(1e-3)",
            got=f"optimizer of type {type(optimizer).__name__}",
            fix="Pass optimizer=optax.adamw(...), or leave it out",
            kind=TypeError,
        )
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        ones, twos = (
            jax.tree.map(lambda leaf, value=value: _filled(leaf, value), params)
            for value in (1.0, 2.0)
        )
        step = jax.jit(
            lambda state, params: optimizer.update(
                jax.tree.map(jnp.zeros_like, params), state, params
            )
        )
        states = optimizer.init(ones), optimizer.init(twos)
        found = jax.tree.map(lambda _: False, params)
        for _ in range(STEPS):
            (small, first), (large, second) = step(states[0], ones), step(states[1], twos)
            found, states = jax.tree.map(_differ, small, large), (first, second)
            if any(jax.tree.leaves(found)):
                break
        return found


def _filled(leaf: Any, value: float) -> Any:
    """Returns a leaf of the same rank, which masks may look at, with a single number."""
    dtype = jnp.result_type(leaf)
    wide = jnp.promote_types(dtype, jnp.float64) if jnp.issubdtype(dtype, jnp.inexact) else dtype
    return jnp.full((1,) * jnp.ndim(leaf), value, wide)


def _differ(small: Any, large: Any) -> bool:
    difference = np.asarray(large - small)
    return bool(np.any(np.isfinite(difference) & (np.abs(difference) > NOTHING)))
