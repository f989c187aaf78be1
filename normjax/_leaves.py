"""Checks the leaves of layers: params, batch_stats and moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from normjax._checks import HOST, Shape, raise_error, raise_for_host

SCALARS = ("count", "count_rest", "alpha", "sigma")
COLLECTIONS = {
    "params": {"scale", "bias", "alpha", "threshold", "epsilon"},
    "batch_stats": {"mean", "var", "count", "count_rest", "mean_rest", "var_rest", "u", "sigma"},
}
REAL = ("var", "threshold", "epsilon", "alpha", "sigma")


def leaves(
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
    """Raises an error unless a tree is a dict of the named arrays that fit x.

    Args:
      function: the name that errors begin with.
      name: the name of the tree.
      tree: the tree to check.
      shape: the shape of each leaf that is not a scalar.
      dtype: the dtype of x.
      required: names of leaves that must be present.
      optional: names of leaves that may be present.
      leading: the sizes of x's non-feature axes; a leaf may have some of them (or ones) as leading
        dimensions.
    """
    known = {*required, *optional}
    if not isinstance(tree, dict) or not known.issuperset(tree) or not set(required) <= set(tree):
        _raise_for_tree(function, name, tree, sorted(required), sorted(known))
    for leaf, value in tree.items():
        where = f"{name}[{leaf!r}]"
        try:
            kind = jax.typeof(value)
        except TypeError:
            _raise_without_array(function, where, value)
        if kind.memory_space is HOST:
            raise_for_host(function, where, value)
        given = kind.shape
        features, allowed = ((), ()) if leaf in SCALARS else (shape, leading)
        extra = len(given) - len(features)
        fits = given == features
        if not fits and 0 < extra <= len(allowed) and given[extra:] == features:
            sizes = zip(given[:extra], allowed, strict=False)
            fits = all([size in (1, full) for size, full in sizes])
        if not fits:
            _raise_for_shape(function, where, given, features, allowed)
        if leaf == "count" or not jnp.issubdtype(kind.dtype, jnp.floating):
            _check_kind(function, where, kind.dtype, leaf, dtype)


def _check_kind(function: str, where: str, given: Any, leaf: str, dtype: Any) -> None:
    """Raises an error for a wrong kind of dtype, such as a complex variance."""
    kind, words = jnp.floating, "a real float"
    if leaf == "count":
        # Averages, such as those of optax.incremental_update, make counts floating-point.
        if given in (jnp.float32, jnp.float64):
            return
        kind, words = jnp.integer, "an int, or a float32 from averages"
    elif leaf not in REAL and jnp.issubdtype(dtype, jnp.complexfloating):
        kind, words = jnp.inexact, "a float, real or complex"
    if not jnp.issubdtype(given, kind):
        raise_error(
            function,
            f"{where} has the wrong kind of dtype",
            expected=words,
            got=f"dtype {given}",
            fix="Pass it in the dtype that the init function gave it",
            kind=TypeError,
        )


def moments(function: str, **given: Any) -> None:
    """Raises an error for arguments that are not `Moments` with matching parts."""
    shapes = []
    for name, argument in given.items():
        if not (isinstance(argument, tuple) and len(argument) == 3):
            raise_error(
                function,
                f"{name} is not a Moments",
                expected="nj.Moments(count, mean, var)",
                got=f"{name} of type {type(argument).__name__}",
                fix="Compute them with nj.moments(x, reduction_axes)",
                kind=TypeError,
            )
        for part, value in zip(("count", "mean", "var"), argument, strict=True):
            if not (hasattr(value, "dtype") or isinstance(value, int | float | complex)):
                _raise_without_array(function, f"{name}.{part}", value)
            shapes.append((f"{name}.{part}", np.shape(value)))
    try:
        np.broadcast_shapes(*(shape for _, shape in shapes))
    except ValueError:
        raise_error(
            function,
            "the moments have different shapes",
            expected="shapes that broadcast to each other",
            got=", ".join(f"{name}.shape={shape}" for name, shape in shapes),
            fix="Compute all of them over the same features",
        )


def params(
    function: str,
    tree: Any,
    x: jax.Array,
    feature_axes: Shape,
    other_axes: Shape,
    *,
    known: Collection[str] = ("scale", "bias"),
    required: Collection[str] = (),
) -> Shape:
    """Raises an error for params that do not fit x; returns the sizes of its feature axes."""
    features = tuple(map(x.shape.__getitem__, feature_axes))
    leading = tuple(map(x.shape.__getitem__, other_axes))
    leaves(
        function,
        "params",
        tree,
        shape=features,
        dtype=x.dtype,
        required=required,
        optional=known,
        leading=leading,
    )
    return features


def _raise_for_tree(
    function: str, name: str, tree: Any, required: list[str], known: list[str]
) -> NoReturn:
    wanted = f"a dict with {required} and at most {known}" if known else "an empty dict"
    if isinstance(tree, dict):
        _raise_if_swapped(function, name, tree, wanted)
        raise_error(
            function,
            f"{name} has the wrong leaves",
            expected=wanted,
            got=f"{name} with {sorted(map(str, tree))}",
            fix="Pass this layer's own sub-tree, as its init function returned it",
        )
    if isinstance(tree, jax.Array | np.ndarray):
        raise_error(
            function,
            f"{name} is an array",
            expected=wanted,
            got=f"an array of shape {np.shape(tree)}",
            fix="The order is (params, batch_stats, x, train)",
            kind=TypeError,
        )
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


def _raise_if_swapped(function: str, name: str, tree: dict[str, Any], wanted: str) -> None:
    """Raises an error if `params` and `batch_stats` are swapped, or both are in one tree."""
    names = set(tree)
    other = "batch_stats" if name == "params" else "params"
    if names and names <= COLLECTIONS[other]:
        problem = f"{name} contains the leaves of {other}: the two are swapped"
        fix = "Pass params first, as in batch_norm(params, batch_stats, x, train)"
    elif names & set(COLLECTIONS):
        problem = f"{name} contains whole collections"
        fix = f'Pass one of them, variables["{name}"]'
    else:
        return
    got = f"{name} with {sorted(map(str, tree))}"
    raise_error(function, problem, expected=wanted, got=got, fix=fix)


def _raise_without_array(function: str, leaf: str, value: object) -> NoReturn:
    raise_error(
        function,
        f"{leaf} is not an array",
        expected="a JAX or NumPy array",
        got=f"{leaf} of type {type(value).__name__}",
        fix="Convert it: jnp.asarray(...), or jax.tree.map over trees of lists",
        kind=TypeError,
    )


def _raise_for_shape(
    function: str, leaf: str, given: Shape, features: Shape, leading: Shape
) -> NoReturn:
    expected = f"shape {features}"
    if leading:
        expected += f", or with leading dimensions as x's non-feature axes, {leading}, or ones"
    raise_error(
        function,
        f"{leaf} does not fit the features of x, of shape {features}",
        expected=expected,
        got=f"shape {given}",
        fix="Channels first? Pass feature_axes=1; else check num_features of the init function",
    )
