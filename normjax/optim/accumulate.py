"""Updates running statistics once per step of `optax.MultiSteps`, from all microbatches."""

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
from normjax.statistics.merge import merge_moments
from normjax.statistics.running import OPTIONS, update_batch_stats
from normjax.statistics.spec import Moments


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      moments: the moments of the microbatches since the last step, for each layer in turn.
      mini_step: the last value of `optax.MultiStepsState.mini_step`.
      gradient_step: the last value of `optax.MultiStepsState.gradient_step`.
    """

    moments: tuple[Moments, ...]
    mini_step: Int[Array, ""]
    gradient_step: Int[Array, ""]


class StatisticsAccumulator(NamedTuple):
    """A pair of functions, like a transformation of optax; see `accumulate`."""

    init: Callable[..., AccumulateState]
    update: Callable[..., tuple[PyTree, AccumulateState]]


def accumulate(
    *, momentum: float | None = 0.99, running_var: RunningVar = "biased"
) -> StatisticsAccumulator:
    r"""Merges the statistics of microbatches, and updates the running ones once per optimizer step.

    .. math:: (n, \mu, \sigma^2) = \text{merge\_moments}_{i=1}^k (n_i, \mu_i, \sigma_i^2), \qquad
              \text{batch\_stats}' = \text{update\_batch\_stats}(\text{batch\_stats}, (n, \mu,
              \sigma^2))

    It goes with `optax.MultiSteps`, and has the effect of one batch of all examples. Updates after
    each microbatch would multiply the old statistics by `momentum ** k` at each step, and would
    leave out the variance between the means of microbatches. Normalization itself still uses each
    microbatch's own statistics: its outputs are needed before the next microbatch is seen.

    The model does not change, and each microbatch starts from the same `batch_stats`:

        optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
        statistics = nj.optim.accumulate(momentum=0.9)  # the momentum of the model's layers
        state = optimizer.init(params)
        seen = statistics.init(batch_stats, state)
        differentiate = jax.value_and_grad(loss_fn, has_aux=True)
        for x in microbatches:
            (loss, new), gradients = differentiate(params, batch_stats, x)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            batch_stats, seen = statistics.update(new, seen, batch_stats, state)

    - `init(batch_stats, state)` returns the accumulator's state. `state` is the optimizer's state,
      which may have `MultiSteps` anywhere in it.
    - `update(new, seen, batch_stats, state, *, count=1)` returns the running statistics, which only
      change after the last microbatch, and the accumulator's new state. It reads from `state` which
      microbatch is the last, and which ones were skipped (`should_skip_update_fn`), to skip them
      too. So pass the *new* state of the optimizer.

    `new` is what the model returned for `batch_stats`: a microbatch's own statistics follow from
    it, as :math:`\mu_i = (\mu'_{\mathrm{new}} - m \mu') / (1 - m)`. It may also have `Moments` in
    place of a layer's dict, with a count for each feature (masks). All other leaves, such as `u`
    and `sigma` of spectral norm, are taken from the last microbatch.

    Args:
      momentum: the momentum of the layers, below 1; None for layers with `momentum=None`, whose
        statistics have a `count`.
      running_var: which variance the layers store. "unbiased" needs true counts, and so `Moments`.

    Returns:
      The pair `(init, update)`; `update` may run in `jax.jit`, `lax.scan`, `pmap` and `shard_map`.
      Its `count` is the number of examples in the microbatch, needed if it varies or may be 0.

    Raises:
      ValueError, TypeError: for trees that do not match, by the leaf's path; for a state without
        `MultiSteps`, or with several; for statistics in bfloat16, which are too coarse. Outside of
        `jax.jit`: for statistics that are not finite, or that a step with this `momentum` cannot
        give.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, optax
      >>> params, batch_stats = nj.batch_norm_init(1)
      >>> optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
      >>> statistics = nj.optim.accumulate(momentum=0.5)
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
        empty = tuple(_nothing(node) for node in nodes.values() if is_layer(node))
        return AccumulateState(empty, *_steps(state))

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
        accumulated, moments = iter(seen.moments), []
        for path, old in olds.items():
            if not is_layer(old):
                olds[path] = jnp.where(stepped, news[path], old)
                continue
            before = next(accumulated)
            own = _own_moments(path, news[path], old, count, momentum, running_var)
            merged = _select(taken, merge_moments(before, own), before)
            options: dict[str, Any] = {"momentum": momentum, "running_var": running_var}
            updated = update_batch_stats(dict(old), merged, **options)
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
        several, none = "the state has several MultiSteps", "the state has no MultiSteps"
        _checks.raise_error(
            "accumulate",
            several if found else none,
            expected="the state of an optimizer with one optax.MultiSteps in it",
            got=f"{type(state).__name__} with {len(found)} MultiStepsState",
            fix="Wrap the optimizer: optax.MultiSteps(optimizer, every_k_schedule=k)",
        )
    # Copies: a train step that donates both states would donate a shared array twice.
    steps = found[0].mini_step, found[0].gradient_step
    mini_step, gradient_step = (jnp.array(plain(step), copy=True) for step in steps)
    return mini_step, gradient_step


def _nodes(name: str, tree: PyTree) -> tuple[dict[KeyPath, Any], Any]:
    """Returns layers' dicts (or Moments) and other leaves, by their paths.

    Raises an error for a mean or variance outside of a layer's dict.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Moments) or is_layer(node)
    )
    for path, node in leaves:
        is_leaf = not isinstance(node, (Moments, Mapping))
        alone = is_leaf and bool(path) and path_names(path)[-1] in STATISTICS
        if alone or (is_layer(node) and not set(node) <= {"mean", "var", "count"}):
            _checks.raise_error(
                "accumulate",
                "statistics are incomplete, or mixed with other leaves",
                expected="dicts of 'mean', 'var' and perhaps 'count'",
                got=f"{show(name, path)}" + ("" if alone else f" with {sorted(map(str, node))}"),
                fix="Pass the dicts of whole layers, and other leaves outside of them",
            )
    return dict(leaves), structure


def _check_match(news: dict[KeyPath, Any], olds: dict[KeyPath, Any]) -> None:
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
            "accumulate",
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


def _nothing(layer: Mapping[str, Array]) -> Moments:
    """Returns the moments of no elements, for the features of a layer."""
    mean, var = layer["mean"], layer["var"]
    mean = jnp.zeros(mean.shape, promote(mean.dtype, jnp.float32))
    var = jnp.zeros(var.shape, promote(var.dtype, jnp.float32))
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
    """Returns the moments of one microbatch, given or recovered from the running statistics."""
    empty = _nothing(old)
    if isinstance(new, Moments):
        return jax.tree.map(_like, new, empty)
    _check_tells(path, new, old, momentum, running_var)
    counts = jnp.broadcast_to(count, empty.var.shape).astype(empty.var.dtype)
    if "count" in old:
        counts = jnp.where(new["count"] > old["count"], counts, 0)
    rate = 1 - momentum if momentum is not None else 1 / jnp.maximum(new["count"], 1)
    mean = old["mean"] + (new["mean"] - old["mean"]) / jnp.asarray(rate, old["mean"].dtype)
    var = old["var"] + (new["var"] - old["var"]) / jnp.asarray(rate, old["var"].dtype)
    _check_momentum(path, var, -16 * jnp.finfo(var.dtype).eps / rate * old["var"], momentum)
    return Moments(counts, mean, jnp.maximum(var, 0))


def _like(part: ArrayLike, like: Array) -> Array:
    return jnp.broadcast_to(part, like.shape).astype(like.dtype)


def _check_momentum(path: KeyPath, var: Array, rounding: Array, momentum: float | None) -> None:
    """Raises an error if another momentum was used, as far as values show it."""
    if not isinstance(var, Tracer) and bool((var < rounding).any()):
        _checks.raise_error(
            "accumulate",
            "a microbatch would have a negative variance",
            expected="statistics of layers with the same momentum",
            got=f"variance {float(var.min()):.3g} at {show('new', path)}, if momentum={momentum}",
            fix="Pass the momentum of the model's layers, and the batch_stats that the model got",
        )


def _check_tells(
    path: KeyPath,
    new: Mapping[str, Array],
    old: Mapping[str, Array],
    momentum: float | None,
    running_var: RunningVar,
) -> None:
    """Raises an error if a microbatch's statistics do not follow from the running ones."""
    where = show("new", path)
    dtype = promote(old["mean"].dtype, old["var"].dtype)
    if running_var == "unbiased":
        problem = "an unbiased variance does not say how many values it has"
        got = f"running_var='unbiased', {where}"
    elif promote(dtype, jnp.float32) != dtype:
        problem = "running statistics are too coarse to recover those of a microbatch"
        got = f"dtype {dtype} at {where}"
    elif not set(new) == set(old) or (momentum is None and "count" not in old):
        problem = "a count of batches is missing"
        got = f"{where} with {sorted(new)}, momentum={momentum}"
    else:
        return
    _checks.raise_error(
        "accumulate",
        problem,
        expected="running statistics in float32 or wider, or Moments",
        got=got,
        fix="Pass nj.Moments(count, mean, var) instead, such as from a model with momentum=0",
    )
