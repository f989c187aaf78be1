"""What a layer asks of the leaves of `params` and `batch_stats`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from normjax._checks import Shape, raise_error

SCALARS = ("count", "alpha", "sigma")
REAL = ("var", "threshold", "epsilon", "alpha", "sigma")


def check_leaves(
    function: str,
    name: str,
    tree: Any,
    *,
    shape: Shape,
    dtype: Any,
    required: Collection[str] = (),
    optional: Collection[str] = (),
    leading: Shape = (),
) -> None:
    """Refuses a tree that is not a dict of the named arrays, each of `shape` and fit for x of `dtype`.

    `leading` are the sizes of the other axes of x: a leaf may have some of them (or ones) in front,
    in their order.
    """
    known = sorted({*required, *optional})
    wanted = f"a dict with {sorted(required)} and at most {known}" if known else "an empty dict"
    if not isinstance(tree, dict):
        frozen = isinstance(tree, Mapping)
        raise_error(
            function,
            f"{name} is not a dict",
            expected=wanted,
            got=f"{type(tree).__name__}",
            fix="Unfreeze it: flax.core.unfreeze(tree)"
            if frozen
            else "Pass it as the layer's init function returned it",
            kind=TypeError,
        )
    if not set(required) <= set(tree) <= set(known):
        raise_error(
            function,
            f"{name} has the wrong leaves",
            expected=wanted,
            got=f"{name} with {sorted(map(str, tree))}",
            fix="Pass this layer's own sub-tree, as its init function returned it",
        )
    for leaf, value in tree.items():
        where = f"{name}[{leaf!r}]"
        if leaf in SCALARS:
            _shape(function, where, value, (), ())
        else:
            _shape(function, where, value, shape, leading)
        _kind(function, where, value, _kind_of(leaf, dtype))


def _kind_of(leaf: str, dtype: Any) -> Any:
    """What kind of number a leaf may hold: counts are ints, variances real, the others no wider a kind than x."""
    if leaf == "count":
        return jnp.integer
    return (
        jnp.inexact
        if leaf not in REAL and jnp.issubdtype(dtype, jnp.complexfloating)
        else jnp.floating
    )


def _shape(function: str, name: str, value: Any, shape: Shape, leading: Shape) -> None:
    given = jnp.shape(value)
    extra = len(given) - len(shape)
    front, features = given[: max(extra, 0)], given[max(extra, 0) :]
    fits = len(front) <= len(leading) and all(
        size in (1, full) for size, full in zip(front, leading, strict=False)
    )
    if features != shape or not fits:
        raise_error(
            function,
            f"{name} does not fit the features of x",
            expected=f"shape {shape}"
            + (f", or that behind leading sizes of x, {leading} or ones" if leading else ""),
            got=f"shape {given}",
            fix="Check num_features of the init function, and feature_axes",
        )


def _kind(function: str, name: str, value: Any, kind: Any) -> None:
    dtype = jnp.asarray(value).dtype
    if not jnp.issubdtype(dtype, kind):
        raise_error(
            function,
            f"{name} holds the wrong kind of number",
            expected={jnp.integer: "an int", jnp.floating: "a real float"}.get(
                kind, "a float, real or complex"
            ),
            got=f"dtype {dtype}",
            fix="Pass it in the dtype that the init function gave it",
            kind=TypeError,
        )
