"""Functions from a batch to a row for each example, as the instruments that look at batches take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from normjax import _checks
from normjax._trees import check_finite, is_nnx, split_module


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled; of an nnx module, that of copies of it, so that it stays as it is."""
    if is_nnx(function):
        states, merge = split_module(function)
        return jax.jit(lambda *batches: merge(*states)(*batches))
    return jax.jit(function)


def check_examples(function: str, name: str, x: Any) -> Array:
    """Returns examples `(batch, ...)`; refuses what is not floating-point, or not finite."""
    x = _checks.activations(function, x, name)
    if jnp.iscomplexobj(x):
        _checks.raise_error(
            function,
            f"{name} is complex",
            expected="real numbers",
            got=f"{name}.dtype={x.dtype} for {name}.shape={x.shape}",
            fix="Let the function put real and imaginary parts together",
            kind=TypeError,
        )
    if 0 in x.shape:
        _checks.raise_error(
            function,
            f"{name} is empty",
            expected="one example or more, (batch, ...)",
            got=f"{name}.shape={x.shape}",
            fix="Pass a batch",
        )
    check_finite(function, name, x)
    return x


def check_rows(function: str, name: str, y: Any, examples: int) -> None:
    """Refuses anything but a floating-point array of a row for each example."""
    if isinstance(y, (jax.Array, jax.ShapeDtypeStruct)) and jnp.issubdtype(y.dtype, jnp.floating):
        if y.shape[:1] == (examples,) and 0 not in y.shape:
            return
        got = f"shape {y.shape}"
    else:
        got = f"{jax.tree.map(lambda leaf: f'{leaf.dtype}{list(leaf.shape)}', y)}"
    _checks.raise_error(
        function,
        f"{name} does not return a row for each example",
        expected=f"a floating-point array of shape ({examples}, ...)",
        got=got,
        fix="Return outputs alone, without the new statistics: lambda x: apply(variables, x)[0]",
    )
