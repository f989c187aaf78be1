"""What instruments of the loss have in common: its arguments checked, and trees of parameters as vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from normjax import _checks
from normjax._trees import check_arrays, check_finite, open_module, show
from normjax._typing import promote, widen

Loss = Callable[[Any], Float[Array, ""]]
Scalar = Float[Array, ""]


def checked(function: str, loss: Loss, params: PyTree) -> tuple[Loss, PyTree[Array]]:
    """Returns a loss, and its parameters in at least float32; refuses those that it has no derivatives by.

    In bfloat16, steps and differences would be those of rounding. Of an nnx module, it is the loss
    of its state.
    """
    _checks.must_be_callable(
        function,
        "loss",
        loss,
        expected="a function of params alone",
        fix=f"The order is {function}(loss, params)",
    )
    params, loss = open_module(params, loss)
    params = differentiable(function, "params", params)
    shape = jax.eval_shape(loss, params)
    number = isinstance(shape, jax.ShapeDtypeStruct) and shape.shape == ()
    if not (number and jnp.issubdtype(shape.dtype, jnp.floating)):
        _checks.raise_error(
            function,
            "loss does not return one real number",
            expected="a floating-point scalar",
            got=f"{jax.tree.map(lambda leaf: f'{leaf.dtype}{list(leaf.shape)}', shape)}",
            fix="Return the mean over the batch alone, without new statistics: lambda params: loss(params)[0]",
            kind=TypeError,
        )
    return loss, params


def differentiable(function: str, name: str, tree: PyTree) -> PyTree[Array]:
    """Returns the tree in at least float32; refuses leaves that are not real floating-point, and not finite ones."""
    check_arrays(function, name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            _checks.raise_error(
                function,
                f"{name} holds what has no real derivative",
                expected="floating-point arrays",
                got=f"dtype {jnp.result_type(leaf)} for {show(name, path)}",
                fix="Close over integers and keys in loss; take complex arrays as their real and imaginary parts",
                kind=TypeError,
            )
    if not jax.tree.leaves(tree):
        _checks.raise_error(
            function,
            f"{name} is empty",
            expected="at least one array",
            got=f"{tree!r}",
            fix="Pass the model's params",
        )
    check_finite(function, name, tree)
    return jax.tree.map(lambda leaf: widen(jnp.asarray(leaf)), tree)


def inner(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    """The inner product of two trees as vectors."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)
    return total(jax.tree.leaves(products))


def norm(a: PyTree[Array]) -> Scalar:
    """The Euclidean length of a tree as a vector; safe from overflow and underflow."""
    leaves = jax.tree.leaves(a)
    largest = reduce(jnp.maximum, _alike([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]))
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(
        total([jnp.sum((leaf / unit.astype(leaf.dtype)) ** 2) for leaf in leaves])
    )


def total(values: list[Array]) -> Array:
    """The sum of arrays, whose precisions may differ."""
    return reduce(add, _alike(values))


def _alike(values: list[Array]) -> list[Array]:
    dtype = promote(*(value.dtype for value in values))
    return [value.astype(dtype) for value in values]


def moved(params: PyTree[Array], direction: PyTree[Array], size: Array) -> PyTree[Array]:
    """The point `params + size * direction`."""
    return jax.tree.map(lambda a, b: a + size.astype(a.dtype) * b, params, direction)


def difference(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """The vector from b to a."""
    return jax.tree.map(jnp.subtract, a, b)
