"""Trees of parameters as optimizers meet them: nnx's variables opened, paths named, masks spread, misfits refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import PyTree

from normjax import _checks

Path = tuple[Any, ...]
Mask = PyTree[bool] | Callable[[PyTree], PyTree[bool]]


def plain(tree: PyTree) -> PyTree:
    """Returns the tree with arrays in place of nnx's variables; of an nnx module, that of its `nnx.Param`s."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    variable = nnx.Variable
    return jax.tree.map(
        lambda leaf: leaf.get_value() if isinstance(leaf, variable) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, variable),
    )


def path_names(path: Path) -> tuple[str, ...]:
    """Returns the names along a path: what lies in one key, as 'Dense_0/kernel/scale' or a tuple, one by one."""
    keys = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path]
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and keys[-1] == "value":
        keys.pop()  # a box around the array, such as flax.linen.Partitioned
    parts = [part for key in keys for part in (key if isinstance(key, tuple) else (key,))]
    return tuple(name for part in parts for name in str(part).split("/"))


def show(tree: str, path: Path) -> str:
    """Names a leaf as it is written in Python."""
    return tree + jax.tree_util.keystr(path)


def spread(function: str, name: str, mask: Mask, tree: PyTree) -> PyTree[bool]:
    """Returns a mask, or what a callable makes of the tree, with a bool for each leaf of the tree; refuses others."""
    chosen = dict(
        jax.tree_util.tree_leaves_with_path(plain(mask(tree) if callable(mask) else mask))
    )
    for path, value in chosen.items():
        if not isinstance(value, (bool, np.bool_)):
            _checks.raise_error(
                function,
                f"{name} does not choose",
                expected="True or False for each leaf, known when the program is compiled",
                got=f"{show(name, path)}={value!r}",
                fix="Make it of Python bools, as decay_mask and scale_invariant do",
                kind=TypeError,
            )

    def choice(path: Path, leaf: Any) -> bool:
        for end in range(len(path), -1, -1):
            if path[:end] in chosen:
                return bool(chosen[path[:end]])
        _checks.raise_error(
            function,
            f"{name} does not fit the parameters",
            expected="a tree of their structure, or a prefix of it",
            got=f"nothing for {show('params', path)} of shape {np.shape(leaf)}",
            fix=f"Make {name} from these parameters, or pass a function that does",
        )

    return jax.tree_util.tree_map_with_path(choice, tree)


def transformation(
    function: str, inner: optax.GradientTransformation | optax.MultiSteps
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that takes extra arguments; refuses what is none."""
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        _checks.raise_error(
            function,
            "inner is no optax transformation",
            expected="a pair of init and update, such as optax.sgd(0.1)",
            got=f"inner of type {type(inner).__name__}",
            fix=f"The order is {function}(mask, inner)"
            if function == "renormalize"
            else "Pass inner=optax.trace(0.9)",
            kind=TypeError,
        )
    return optax.with_extra_args_support(inner)


def check_params(function: str, updates: PyTree, params: PyTree | None) -> None:
    """Refuses missing params, and params that updates do not fit."""
    if params is None:
        _checks.raise_error(
            function,
            "params are missing, and a direction is that of a parameter",
            expected="update(updates, state, params)",
            got="params=None",
            fix="Pass params to optimizer.update",
        )
    check_alike(function, ("updates", updates), ("params", params))


def check_alike(function: str, one: tuple[str, PyTree], other: tuple[str, PyTree]) -> None:
    """Refuses two trees, each behind its name, of other leaves or shapes."""
    a, b = (dict(jax.tree_util.tree_leaves_with_path(tree)) for _, tree in (one, other))
    for (name, own), (against, others) in (
        ((one[0], a), (other[0], b)),
        ((other[0], b), (one[0], a)),
    ):
        for path in own:
            if path not in others:
                _checks.raise_error(
                    function,
                    f"{one[0]} and {other[0]} do not have the same leaves",
                    expected="trees of one structure",
                    got=f"{show(name, path)}, which {against} lacks",
                    fix=f"Pass {one[0]} and {other[0]} of the same model",
                )
    for path, leaf in a.items():
        if np.shape(leaf) != np.shape(b[path]):
            _checks.raise_error(
                function,
                f"{one[0]} and {other[0]} differ in shape",
                expected=f"shape {np.shape(b[path])}, that of {show(other[0], path)}",
                got=f"shape {np.shape(leaf)} for {show(one[0], path)}",
                fix=f"Pass {one[0]} and {other[0]} of the same model",
            )


def check_arrays(function: str, name: str, tree: PyTree) -> None:
    """Refuses leaves that are no arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            _checks.raise_error(
                function,
                f"{name} does not hold arrays alone",
                expected="a tree of arrays",
                got=f"{show(name, path)} of type {type(leaf).__name__}",
                fix="Pass what the model's init returned, or a part of it",
                kind=TypeError,
            )


def check_finite(function: str, name: str, tree: PyTree) -> None:
    """Refuses NaN and infinities, where there are values to look at."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        with jax.ensure_compile_time_eval():  # also of constants in a program that is being traced
            bad = int((~jnp.isfinite(leaf)).sum())
        if bad:
            _checks.raise_error(
                function,
                f"{name} is not finite",
                expected="finite numbers",
                got=f"{bad} NaN or infinite of {np.size(leaf)} in {show(name, path)}",
                fix="Look for the step that made them: jax.config.update('jax_debug_nans', True)",
            )
