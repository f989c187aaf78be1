"""Finds the parameters that an optimizer decays: it changes them although gradients are 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from normjax import _checks
from normjax.diagnostics.findings import Finding
from normjax.diagnostics.lint._graph import Unknown
from normjax.diagnostics.lint._model import FUNCTION
from normjax.diagnostics.lint._network import Network
from normjax.diagnostics.lint._norms import Norm

# The most steps that are tried: some schedules start at a learning rate of 0, and some optimizers
# collect gradients first.
STEPS = 100
NOTHING = 1e-13  # a smaller change of a parameter of 1, in float64, is a rounding error


def decayed_scales(network: Network, optimizer: Any, params: PyTree) -> Iterator[Finding]:
    """Yields normalizations whose scale or bias an optimizer decays."""
    names = [leaf for leaf, name in network.leaves.items() if name.collection == "params"]
    moves = jax.tree.leaves(decays(optimizer, params))
    decayed = {leaf for leaf, moved in zip(names, moves, strict=True) if moved}
    for norm in network.norms:
        hit = sorted(norm.leaves & decayed)
        if hit and not _is_offset(network, norm):
            listed = " and ".join(repr(network.leaves[leaf].name) for leaf in hit)
            yield Finding(
                network.path(norm),
                "decayed-scale",
                "warning",
                f"the optimizer decays its {listed}",
                "leave scales and biases out: mask=nj.optim.decay_mask in optax.adamw or "
                "optax.add_decayed_weights",
            )


def _is_offset(network: Network, norm: Norm) -> bool:
    """Returns whether the scale is stored as an offset, so that variables of 0 do not make y 0."""
    try:
        factors = network.factors(norm, zeros=True)
    except Unknown:
        return False
    return bool(factors) and all(bool(jnp.any(factor != 0)) for factor in factors)


def decays(optimizer: Any, params: PyTree) -> PyTree[bool]:
    """Returns which parameters change with gradients of 0, by different amounts from 1 and 2."""
    _check_optimizer(optimizer)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        ones = jax.tree.map(lambda leaf: _filled(leaf, 1.0), params)
        twos = jax.tree.map(lambda leaf: _filled(leaf, 2.0), params)

        @jax.jit
        def step(state: Any, params: PyTree) -> tuple[PyTree, Any]:
            gradients = jax.tree.map(jnp.zeros_like, params)
            return optimizer.update(gradients, state, params)

        states = optimizer.init(ones), optimizer.init(twos)
        found = jax.tree.map(lambda _: False, params)
        for _ in range(STEPS):
            (small, first), (large, second) = step(states[0], ones), step(states[1], twos)
            found, states = jax.tree.map(_differ, small, large), (first, second)
            if any(jax.tree.leaves(found)):
                break
        return found


def _check_optimizer(optimizer: Any) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        _checks.raise_error(
            FUNCTION,
            "optimizer is not an optax transformation",
            expected="a pair of init and update, such as optax.adamw(1e-3)",
            got=f"optimizer of type {type(optimizer).__name__}",
            fix="Pass optimizer=optax.adamw(...), or leave it out",
            kind=TypeError,
        )


def _filled(leaf: Any, value: float) -> Any:
    """Returns an array of one number, in the rank of the leaf, which masks may depend on."""
    dtype = jnp.result_type(leaf)
    wide = jnp.promote_types(dtype, jnp.float64) if jnp.issubdtype(dtype, jnp.inexact) else dtype
    return jnp.full((1,) * jnp.ndim(leaf), value, wide)


def _differ(small: Any, large: Any) -> bool:
    difference = np.asarray(large - small)
    return bool(np.any(np.isfinite(difference) & (np.abs(difference) > NOTHING)))
