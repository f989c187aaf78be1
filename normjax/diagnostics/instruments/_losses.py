"""Checks losses and their parameters, and computes with trees of parameters as vectors."""

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
    """Returns a loss and its parameters in at least float32, or raises an error.

    In bfloat16, rounding errors would dominate steps and differences. For an nnx module, the loss
    returned is a function of the module's state.
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
            fix="Return only the mean over the batch: lambda params: loss(params)[0]",
            kind=TypeError,
        )
    return loss, params


def differentiable(function: str, name: str, tree: PyTree) -> PyTree[Array]:
    """Returns the tree in at least float32; raises an error unless leaves are real and finite."""
    check_arrays(function, name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            _checks.raise_error(
                function,
                f"{name} has a leaf without a real derivative",
                expected="floating-point arrays",
                got=f"dtype {jnp.result_type(leaf)} for {show(name, path)}",
                fix="Close over integers and keys in loss; split complex parameters",
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
    """Returns the inner product of two trees as vectors."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)
    return total(jax.tree.leaves(products))


def norm(a: PyTree[Array]) -> Scalar:
    """Returns the Euclidean length of a tree as a vector, without overflow or underflow."""
    leaves = jax.tree.leaves(a)
    sizes = [jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]
    largest = reduce(jnp.maximum, _alike(sizes))
    unit = jnp.where(largest > 0, largest, 1)
    squares = [jnp.sum((leaf / unit.astype(leaf.dtype)) ** 2) for leaf in leaves]
    return unit * jnp.sqrt(total(squares))


def total(values: list[Array]) -> Array:
    """Returns the sum of arrays that may differ in precision."""
    return reduce(add, _alike(values))


def _alike(values: list[Array]) -> list[Array]:
    dtype = promote(*(value.dtype for value in values))
    return [value.astype(dtype) for value in values]


def moved(params: PyTree[Array], direction: PyTree[Array], size: Array) -> PyTree[Array]:
    """Returns the point `params + size * direction`."""
    return jax.tree.map(lambda a, b: a + size.astype(a.dtype) * b, params, direction)


def difference(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    """Returns the vector from b to a."""
    return jax.tree.map(jnp.subtract, a, b)
