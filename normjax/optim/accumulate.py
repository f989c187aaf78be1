"""Running statistics beside `optax.MultiSteps`: those of all microbatches merged, once per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Int, PyTree

from normjax import _checks
from normjax._trees import STATISTICS, KeyPath, check_finite, is_layer, path_names, plain, show
from normjax._typing import RunningVar, promote
from normjax.statistics.moments import merge_moments
from normjax.statistics.reduction import Moments
from normjax.statistics.running import OPTIONS, update_batch_stats


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      moments: of the microbatches since the last step, for each layer in turn.
      mini_step: as `optax.MultiStepsState` had it when it was last seen.
      gradient_step: likewise.
    """

    moments: tuple[Moments, ...]
    mini_step: Int[Array, ""]
    gradient_step: Int[Array, ""]


class StatisticsAccumulator(NamedTuple):
    """A pair of functions, as optax's transformations are; see `accumulate`."""

    init: Callable[..., AccumulateState]
    update: Callable[..., tuple[PyTree, AccumulateState]]


def accumulate(
    *, momentum: float | None = 0.99, running_var: RunningVar = "biased"
) -> StatisticsAccumulator:
    r"""Merges the batch statistics of microbatches, and updates the running ones once per step of `optax.MultiSteps`.

    .. math:: (n, \mu, \sigma^2) = \text{merge\_moments}_{i=1}^k (n_i, \mu_i, \sigma_i^2), \qquad
              \text{batch\_stats}' = \text{update\_batch\_stats}(\text{batch\_stats}, (n, \mu,
              \sigma^2))

    That is what one batch of all examples does. Updates for each microbatch forget `momentum ** k`
    at each step, and leave out the variance between the means of microbatches. What stays per
    microbatch is normalization itself: its outputs are needed before the next microbatch is seen.

    The model is as it is, and each microbatch starts from the same `batch_stats`:

        optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
        statistics = nj.optim.accumulate(momentum=0.9)  # that of the model's layers
        state = optimizer.init(params)
        seen = statistics.init(batch_stats, state)
        for x in microbatches:
            (loss, new), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_stats,
            x) updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            batch_stats, seen = statistics.update(new, seen, batch_stats, state)

    - `init(batch_stats, state)` returns the state. `state` is that of the optimizer, wherever
      `MultiSteps` is in it.
    - `update(new, seen, batch_stats, state, *, count=1)` returns the running statistics, unchanged
      but after the last microbatch, and the new state. It takes from `state` which one is the last,
      and which ones were skipped (`should_skip_update_fn`): they do not count here either. So pass
      the *new* state of the optimizer.

    `new` is what the model returned for `batch_stats`: a microbatch's own statistics follow from
    it, as :math:`\mu_i = (\mu'_{\mathrm{new}} - m \mu') / (1 - m)`. Or it has `Moments` in place of
    a layer's dict, which may count each feature apart (masks). Leaves that are no mean, variance or
    count (`u` and `sigma` of spectral norm) are taken from the last microbatch.

    Args:
      momentum: of the layers, below 1; None for layers with `momentum=None`, whose statistics have
        a `count`.
      running_var: which variance the layers store. "unbiased" needs true counts, and so `Moments`.

    Returns:
      The pair `(init, update)`; `update` may run in `jax.jit`, `lax.scan`, `pmap` and `shard_map`.
      Its `count` is the number of examples of the microbatch, where it differs between them or may
      be 0.

    Raises:
      ValueError, TypeError: for trees that do not match, by the leaf's path; for a state without
        `MultiSteps`, or with several; for statistics in bfloat16, which are too coarse. Outside of
        `jax.jit`: for statistics that are not finite, or that `momentum` cannot have moved.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, optax
      >>> params, batch_stats = nj.batch_norm_init(1)
      >>> optimizer, statistics = optax.MultiSteps(optax.sgd(0.1), 2), nj.optim.accumulate(momentum=0.5)
      >>> state = optimizer.init(params)
      >>> seen = statistics.init(batch_stats, state)
      >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])):
      ...     _, new = nj.batch_norm(params, batch_stats, x, train=True, momentum=0.5)
      ...     _, state = optimizer.update(params, state, params)
      ...     batch_stats, seen = statistics.update(new, seen, batch_stats, state)
      >>> print(batch_stats)
      {'mean': Array([2.], dtype=float32), 'var': Array([3.], dtype=float32)}

    References:
      Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), eq. 2.1.
      Ioffe & Szegedy, "Batch Normalization" (2015), section 3.1.
    """
    function = "accumulate"
    _checks.choice(function, "running_var", running_var, OPTIONS)
    if momentum is not None:
        _checks.between(function, "momentum", momentum, 0.0, float(np.nextafter(1, 0)))

    def init(batch_stats: PyTree, state: optax.OptState) -> AccumulateState:
        batch_stats = plain(batch_stats)
        check_finite(function, "batch_stats", batch_stats)
        nodes, _ = _nodes("batch_stats", batch_stats)
        return AccumulateState(
            tuple(_nothing(node) for node in nodes.values() if is_layer(node)), *_steps(state)
        )

    def update(
        new: PyTree,
        seen: AccumulateState,
        batch_stats: PyTree,
        state: optax.OptState,
        *,
        count: ArrayLike = 1,
    ) -> tuple[PyTree, AccumulateState]:
        mini_step, gradient_step = _steps(state)
        stepped = gradient_step != seen.gradient_step
        taken = stepped | (mini_step != seen.mini_step)
        new = plain(new)
        if not isinstance(taken, Tracer) and taken:
            check_finite(function, "new", new)
        (news, _), (olds, structure) = _nodes("new", new), _nodes("batch_stats", plain(batch_stats))
        _check_match(news, olds)
        kept, moments = iter(seen.moments), []
        for path, old in olds.items():
            if not is_layer(old):
                olds[path] = jnp.where(stepped, news[path], old)
                continue
            own, before = (
                _own_moments(path, news[path], old, count, momentum, running_var),
                next(kept),
            )
            merged = _select(taken, merge_moments(before, own), before)
            updated = update_batch_stats(
                dict(old), merged, momentum=momentum, running_var=running_var
            )
            olds[path] = type(old)(_select(stepped, updated, dict(old)))
            moments.append(_select(stepped, _nothing(old), merged))
        new_state = AccumulateState(tuple(moments), mini_step, gradient_step)
        return jax.tree.unflatten(structure, list(olds.values())), new_state

    return StatisticsAccumulator(init, update)


def _steps(state: optax.OptState) -> tuple[Array, Array]:
    """Returns copies of mini_step and gradient_step of the one `MultiSteps` in the state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.MultiStepsState))
    found = [node for node in nodes if isinstance(node, optax.MultiStepsState)]
    if len(found) != 1:
        _checks.raise_error(
            "accumulate",
            "the state says nothing about steps"
            if not found
            else "the state speaks of different steps",
            expected="the state of an optimizer with one optax.MultiSteps in it",
            got=f"{type(state).__name__} with {len(found)} MultiStepsState",
            fix="Wrap the optimizer: optax.MultiSteps(optimizer, every_k_schedule=k)",
        )
    # Copies: a train step that donates both states would donate a shared array twice.
    steps = found[0].mini_step, found[0].gradient_step
    mini_step, gradient_step = (jnp.array(plain(step), copy=True) for step in steps)
    return mini_step, gradient_step


def _nodes(name: str, tree: PyTree) -> tuple[dict[KeyPath, Any], Any]:
    """Returns layers' dicts (or Moments) and other leaves, by their paths; refuses a mean or variance by itself."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Moments) or is_layer(node)
    )
    for path, node in leaves:
        name_of_leaf = path_names(path)[-1] if path else ""
        alone = not isinstance(node, (Moments, Mapping)) and name_of_leaf in STATISTICS
        if alone or (is_layer(node) and not set(node) <= {"mean", "var", "count"}):
            _checks.raise_error(
                "accumulate",
                "there is more or less than a layer's running statistics",
                expected="dicts of 'mean', 'var' and perhaps 'count'",
                got=f"{show(name, path)}" + ("" if alone else f" with {sorted(map(str, node))}"),
                fix="Pass the dicts of whole layers, and others apart",
            )
    return dict(leaves), structure


def _check_match(news: dict[KeyPath, Any], olds: dict[KeyPath, Any]) -> None:
    """Refuses layers and leaves without their like, or of other shapes."""
    for path in [*olds, *news]:
        if path not in news or path not in olds:
            lacking, other = ("new", "batch_stats") if path in olds else ("batch_stats", "new")
            problem, got = (
                f"{lacking} lacks statistics that {other} has",
                f"nothing at {show(lacking, path)}",
            )
        elif (given := _shapes(news[path])) != (kept := _shapes(olds[path])):
            problem, got = f"{show('new', path)} does not fit", f"{given} for {kept}"
        else:
            continue
        _checks.raise_error(
            "accumulate",
            problem,
            expected="what the model returned for batch_stats, or Moments of the same features for its layers",
            got=got,
            fix="Pass new and batch_stats of the same model and step",
        )


def _shapes(node: Any) -> dict[str, tuple[int, ...]] | tuple[int, ...]:
    if isinstance(node, Moments):
        return {"mean": jnp.shape(node.mean), "var": jnp.shape(node.var)}
    return (
        {leaf: jnp.shape(node[leaf]) for leaf in STATISTICS} if is_layer(node) else jnp.shape(node)
    )


def _nothing(layer: Mapping[str, Array]) -> Moments:
    """The moments of no elements, for the features of a layer."""
    mean, var = (layer[leaf] for leaf in STATISTICS)
    mean, var = (jnp.zeros(leaf.shape, promote(leaf.dtype, jnp.float32)) for leaf in (mean, var))
    return Moments(jnp.zeros_like(var), mean, var)


def _select(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(b.dtype), yes, no)


def _own_moments(
    path: KeyPath,
    new: Any,
    old: Mapping[str, Array],
    count: ArrayLike,
    momentum: float | None,
    running_var: RunningVar,
) -> Moments:
    """The moments of one microbatch: as given, or as what moved the running statistics from old to new."""
    empty = _nothing(old)
    if isinstance(new, Moments):
        return jax.tree.map(
            lambda part, like: jnp.broadcast_to(part, like.shape).astype(like.dtype), new, empty
        )
    _check_tells(path, new, old, momentum, running_var)
    counts = jnp.broadcast_to(count, empty.var.shape).astype(empty.var.dtype)
    if "count" in old:
        counts = jnp.where(new["count"] > old["count"], counts, 0)
    rate = 1 - momentum if momentum is not None else 1 / jnp.maximum(new["count"], 1)
    mean, var = (
        old[leaf] + (new[leaf] - old[leaf]) / jnp.asarray(rate, old[leaf].dtype)
        for leaf in STATISTICS
    )
    _check_momentum(path, var, -16 * jnp.finfo(var.dtype).eps / rate * old["var"], momentum)
    return Moments(counts, mean, jnp.maximum(var, 0))


def _check_momentum(path: KeyPath, var: Array, rounding: Array, momentum: float | None) -> None:
    """Refuses what another momentum has moved, where it shows and there are values to look at."""
    if not isinstance(var, Tracer) and bool((var < rounding).any()):
        _checks.raise_error(
            "accumulate",
            "a microbatch would have a negative variance",
            expected="statistics that layers moved by `momentum`",
            got=f"variance {float(var.min()):.3g} at {show('new', path)}, if momentum={momentum}",
            fix="Pass the momentum of the model's layers, and the batch_stats that the model was given",
        )


def _check_tells(
    path: KeyPath,
    new: Mapping[str, Array],
    old: Mapping[str, Array],
    momentum: float | None,
    running_var: RunningVar,
) -> None:
    """Refuses running statistics that a microbatch's own cannot be told from."""
    where = show("new", path)
    dtype = promote(old["mean"].dtype, old["var"].dtype)
    if running_var == "unbiased":
        problem, got = (
            "an unbiased variance does not tell of how many values it is",
            f"running_var='unbiased', {where}",
        )
    elif promote(dtype, jnp.float32) != dtype:
        problem, got = (
            "running statistics are too coarse to tell those of a microbatch",
            f"dtype {dtype} at {where}",
        )
    elif not set(new) == set(old) or (momentum is None and "count" not in old):
        problem, got = (
            "a count of batches is missing",
            f"{where} with {sorted(new)}, momentum={momentum}",
        )
    else:
        return
    _checks.raise_error(
        "accumulate",
        problem,
        expected="running statistics as `momentum` moves them, in float32 or wider, or Moments",
        got=got,
        fix="Pass nj.Moments(count, mean, var) in its place, such as those of a model with momentum=0",
    )
