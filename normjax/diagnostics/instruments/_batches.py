"""Compiles functions that return a row for each example of a batch, and checks their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from normjax import _checks
from normjax._trees import check_finite, is_nnx, split_module


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled function; an nnx module is copied at each call and does not change."""
    if is_nnx(function):
        states, merge = split_module(function)
        return jax.jit(lambda *batches: merge(*states)(*batches))
    return jax.jit(function)


def check_examples(function: str, name: str, x: Any) -> Array:
    """Returns examples `(batch, ...)`; raises an error if they are not real and finite."""
    x = _checks.activations(function, x, name)
    if jnp.iscomplexobj(x):
        _checks.raise_error(
            function,
            f"{name} is complex",
            expected="real numbers",
            got=f"{name}.dtype={x.dtype} for {name}.shape={x.shape}",
            fix="Pass real and imaginary parts, and combine them in the function",
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
    """Raises an error unless y is a floating-point array with a row for each example."""
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
        fix="Return only outputs, without new statistics: lambda x: apply(variables, x)[0]",
    )
