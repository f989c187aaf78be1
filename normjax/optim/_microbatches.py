"""Reads the statistics of a microbatch from the output of a model, for `accumulate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PyTree

from normjax import _checks
from normjax._trees import (
    STATISTICS,
    KeyPath,
    check_finite,
    is_layer,
    is_nnx,
    path_names,
    plain,
    show,
)
from normjax._typing import RunningVar, promote
from normjax.statistics.microbatch import UNTOLD, Microbatch, like, no_microbatch, rule_of
from normjax.statistics.population import POPULATION
from normjax.statistics.spec import Moments

FUNCTION = "accumulate"
LAYERS: Literal["layers"] = "layers"
Momentum = float | None | Literal["layers"]


def steps_of(state: optax.OptState) -> tuple[Array, Array]:
    """Returns copies of mini_step and gradient_step of the only `MultiSteps` in the state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.MultiStepsState))
    found = [node for node in nodes if isinstance(node, optax.MultiStepsState)]
    if len(found) != 1:
        several, none = "the state has several MultiSteps", "the state has no MultiSteps"
        _checks.raise_error(
            FUNCTION,
            several if found else none,
            expected="the state of an optimizer with one optax.MultiSteps in it",
            got=f"{type(state).__name__} with {len(found)} MultiStepsState",
            fix="Wrap the optimizer: optax.MultiSteps(optimizer, every_k_schedule=k)",
        )
    # Copies, since a train step that donates both states would donate a shared array twice.
    steps = found[0].mini_step, found[0].gradient_step
    mini_step, gradient_step = (jnp.array(plain(step), copy=True) for step in steps)
    return mini_step, gradient_step


def with_questions(variables: Any) -> Any:
    """Returns variables with a leaf in each layer that collects its microbatch statistics."""
    if is_nnx(variables):
        from flax import nnx

        for _, module in nnx.iter_modules(variables):
            parts = {leaf: getattr(module, leaf, None) for leaf in STATISTICS}
            if all(isinstance(part, nnx.BatchStat) for part in parts.values()):
                setattr(module, POPULATION, nnx.BatchStat(no_microbatch(plain(parts))))
        return variables
    if is_nnx(variables, "State"):
        _checks.raise_error(
            FUNCTION,
            "an nnx.State has no layers that could collect statistics",
            expected="the nnx.Module, which is changed in place",
            got=f"an nnx.State with {sorted(map(str, variables))}",
            fix="Call statistics.collecting(model) once, before the training",
            kind=TypeError,
        )

    def asked(node: Any) -> Any:
        if not is_layer(node):
            return node
        kind: Any = type(node)  # also Flax's FrozenDict
        return kind({**node, POPULATION: no_microbatch(node)})

    return jax.tree.map(asked, variables, is_leaf=is_layer)


def nodes_of(name: str, tree: PyTree) -> tuple[dict[KeyPath, Any], Any]:
    """Returns the dicts (or Moments) of layers, and other leaves, by path.

    Raises an error for a mean or variance outside of a layer's dict.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Moments) or is_layer(node)
    )
    for path, node in leaves:
        is_leaf = not isinstance(node, (Moments, Mapping))
        alone = is_leaf and bool(path) and path_names(path)[-1] in STATISTICS
        if alone or (is_layer(node) and not set(node) <= {*STATISTICS, "count", POPULATION}):
            _checks.raise_error(
                FUNCTION,
                "statistics are incomplete, or mixed with other leaves",
                expected="dicts of 'mean', 'var' and perhaps 'count'",
                got=f"{show(name, path)}" + ("" if alone else f" with {sorted(map(str, node))}"),
                fix="Pass the dicts of whole layers, and other leaves outside of them",
            )
    return dict(leaves), structure


def check_numbers(name: str, tree: PyTree) -> None:
    """Raises an error, with the path, for statistics or moments that are not finite."""

    def told(node: Any) -> Any:
        if not is_layer(node) or POPULATION not in node:
            return node
        moments = node[POPULATION].moments
        return {"mean": moments.mean, "var": moments.var}

    check_finite(FUNCTION, name, jax.tree.map(told, tree, is_leaf=is_layer))


def check_match(news: dict[KeyPath, Any], olds: dict[KeyPath, Any]) -> None:
    """Raises an error if the two sides differ in layers, leaves or shapes."""
    for path in [*olds, *news]:
        if path not in news or path not in olds:
            lacking, other = ("new", "batch_stats") if path in olds else ("batch_stats", "new")
            problem = f"{lacking} lacks statistics that {other} has"
            got = f"nothing at {show(lacking, path)}"
        elif _shapes(news[path]) != _shapes(olds[path]):
            problem = f"{show('new', path)} does not fit"
            got = f"{_shapes(news[path])} for {_shapes(olds[path])}"
        else:
            continue
        _checks.raise_error(
            FUNCTION,
            problem,
            expected="what the model returned for batch_stats, or Moments of the same features "
            "for its layers",
            got=got,
            fix="Pass new and batch_stats of the same model and step",
        )


def _shapes(node: Any) -> dict[str, tuple[int, ...]] | tuple[int, ...]:
    if isinstance(node, Moments):
        return {"mean": jnp.shape(node.mean), "var": jnp.shape(node.var)}
    if is_layer(node):
        return {leaf: jnp.shape(node[leaf]) for leaf in STATISTICS}
    return jnp.shape(node)


def of_layer(
    path: KeyPath,
    new: Any,
    old: Mapping[str, Array],
    count: ArrayLike,
    momentum: Momentum,
    running_var: RunningVar,
) -> Microbatch:
    """Returns the microbatch of a layer: the stored one, or recovered by a given momentum."""
    told = new[POPULATION] if is_layer(new) and POPULATION in new else None
    if momentum == LAYERS:
        return _own_words(path, new, old, told, running_var)
    if told is not None:
        _checks.raise_error(
            FUNCTION,
            "a momentum is given, but the layers report their own momentum",
            expected="only one of them",
            got=f"momentum={momentum}, and moments that {show('new', path)} collected",
            fix="Drop the momentum: nj.optim.accumulate()",
        )
    if not isinstance(new, Moments):
        new = _recovered(path, new, old, count, momentum, running_var)
    elif momentum is None and "count" not in old:
        _check_tells(path, dict.fromkeys(STATISTICS), old, momentum, "biased")
    return like(no_microbatch(old), Microbatch(new, rule_of(old, momentum, running_var)))


def _own_words(
    path: KeyPath,
    new: Any,
    old: Mapping[str, Array],
    told: Microbatch | None,
    running_var: RunningVar,
) -> Microbatch:
    """Returns what a layer has reported, or NaN if it reported nothing at run time."""
    if told is None and isinstance(new, Moments):
        _raise_silent(path, "Moments alone")
    if told is None:
        _check_tells(path, new, old, 0.0, running_var)
        _raise_silent(path, f"only {sorted(new)}")
    momentum = told.rule.momentum
    same = [new[leaf] is old[leaf] for leaf in STATISTICS]
    if all(same):  # a frozen layer, or a layer that was not called
        return told
    if not isinstance(momentum, Tracer) and (np.asarray(momentum) == UNTOLD).all():
        _raise_silent(path, "running statistics that were updated by an unknown momentum")
    moved = [jnp.any(new[leaf] != old[leaf].astype(new[leaf].dtype)) for leaf in STATISTICS]
    wrong = (momentum == UNTOLD) & (moved[0] | moved[1])
    nan: Any = jnp.nan
    poison = like(told, Microbatch(Moments(1, nan, nan), rule_of(old, 0.0, "biased")))
    return jax.tree.map(lambda bad, good: jnp.where(wrong, bad, good), poison, told)


def _raise_silent(path: KeyPath, got: str) -> NoReturn:
    _checks.raise_error(
        FUNCTION,
        "a layer did not report its momentum",
        expected="the moments that layers of normjax collect in training mode",
        got=f"{got} at {show('new', path)}",
        fix="Call the model with statistics.collecting(batch_stats), an nnx module after "
        "statistics.collecting(model). For layers of other libraries, give the momentum of all: "
        "nj.optim.accumulate(momentum=0.9)",
    )


def _recovered(
    path: KeyPath,
    new: Mapping[str, Array],
    old: Mapping[str, Array],
    count: ArrayLike,
    momentum: float | None,
    running_var: RunningVar,
) -> Moments:
    """Returns the moments of one microbatch, recovered from the running statistics."""
    _check_tells(path, new, old, momentum, running_var)
    empty = no_microbatch(old).moments
    counts = jnp.broadcast_to(count, empty.var.shape).astype(empty.var.dtype)
    if "count" in old:
        counts = jnp.where(new["count"] > old["count"], counts, 0)
    rate = 1 - momentum if momentum is not None else 1 / jnp.maximum(new["count"], 1)
    mean = old["mean"] + (new["mean"] - old["mean"]) / jnp.asarray(rate, old["mean"].dtype)
    var = old["var"] + (new["var"] - old["var"]) / jnp.asarray(rate, old["var"].dtype)
    lowest = -16 * jnp.finfo(var.dtype).eps / rate * old["var"]
    _check_momentum(path, var, lowest, momentum)
    # A compiled program cannot raise an error, so the result is NaN, not a plausible number.
    return Moments(counts, mean, jnp.where(var < lowest, jnp.nan, jnp.maximum(var, 0)))


def _check_momentum(path: KeyPath, var: Array, rounding: Array, momentum: float | None) -> None:
    """Raises an error if the values show that the model used another momentum."""
    if not isinstance(var, Tracer) and bool((var < rounding).any()):
        _checks.raise_error(
            FUNCTION,
            "a microbatch would have a negative variance",
            expected="statistics of layers with the same momentum",
            got=f"variance {float(var.min()):.3g} at {show('new', path)}, if momentum={momentum}",
            fix="Leave the momentum out, and call the model with statistics.collecting("
            "batch_stats); or pass the momentum of the model's layers, and the batch_stats that "
            "the model got",
        )


def _check_tells(
    path: KeyPath,
    new: Mapping[str, Any],
    old: Mapping[str, Array],
    momentum: float | None,
    running_var: RunningVar,
) -> None:
    """Raises an error if microbatch statistics cannot be recovered from running statistics."""
    where = show("new", path)
    dtype = promote(old["mean"].dtype, old["var"].dtype)
    if running_var == "unbiased":
        problem = "an unbiased variance does not determine the number of values"
        got = f"running_var='unbiased', {where}"
    elif promote(dtype, jnp.float32) != dtype:
        problem = "running statistics are too imprecise to recover the statistics of a microbatch"
        got = f"dtype {dtype} at {where}"
    elif not set(new) == set(old) or (momentum is None and "count" not in old):
        problem = "the count of batches is missing"
        got = f"{where} with {sorted(new)}, momentum={momentum}"
    else:
        return
    _checks.raise_error(
        FUNCTION,
        problem,
        expected="running statistics in float32 or wider, or Moments",
        got=got,
        fix="Call the model with statistics.collecting(batch_stats), without a momentum here; or "
        "pass nj.Moments(count, mean, var) and the momentum of the layers",
    )
