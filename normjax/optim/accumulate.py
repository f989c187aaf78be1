"""Updates running statistics once per step of `optax.MultiSteps`, from all microbatches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Int, PyTree

from normjax import _checks
from normjax._trees import is_layer, plain
from normjax._typing import RunningVar
from normjax.optim._microbatches import (
    LAYERS,
    check_match,
    check_numbers,
    nodes_of,
    of_layer,
    steps_of,
    with_questions,
)
from normjax.statistics.microbatch import Microbatch, Rule, no_microbatch, select
from normjax.statistics.population import POPULATION
from normjax.statistics.running import OPTIONS
from normjax.statistics.spec import Moments


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      moments: for each layer, the moments of the microbatches since the last step.
      mini_step: the last value of `optax.MultiStepsState.mini_step`.
      gradient_step: the last value of `optax.MultiStepsState.gradient_step`.
      rules: the momentum and the kind of variance of each layer, as it last reported them.
    """

    moments: tuple[Moments, ...]
    mini_step: Int[Array, ""]
    gradient_step: Int[Array, ""]
    rules: tuple[Rule, ...]


class StatisticsAccumulator(NamedTuple):
    """A pair of functions like an optax transformation; see `accumulate`."""

    init: Callable[..., AccumulateState]
    update: Callable[..., tuple[PyTree, AccumulateState]]

    def collecting(self, variables: Any) -> Any:
        """Returns variables with which layers report their moments and momentum.

        Args:
          variables: `batch_stats`, all collections of linen, a tuple of trees, or an `nnx.Module`.

        Returns:
          The variables with an additional leaf in each layer that has running statistics. A module
          is changed in place and returned; do this once before training.
        """
        return with_questions(variables)


def accumulate(
    *,
    momentum: float | None | Literal["layers"] = LAYERS,
    running_var: RunningVar = "biased",
) -> StatisticsAccumulator:
    r"""Merges microbatch statistics, and updates running statistics once per optimizer step.

    .. math:: (n, \mu, \sigma^2) = \text{merge\_moments}_{i=1}^k (n_i, \mu_i, \sigma_i^2), \qquad
              \text{batch\_stats}' = \text{update\_batch\_stats}(\text{batch\_stats}, (n, \mu,
              \sigma^2))

    Use it with `optax.MultiSteps`. The running statistics are updated as if all microbatches were
    one batch. Updates after each microbatch would instead multiply the old statistics by `momentum
    ** k` in each step, and would leave out the variance between the means of microbatches. The
    normalization still uses the statistics of each microbatch, since its output is needed before
    the next microbatch is seen.

    Each layer's own momentum is used, and layers may differ. Call the model with
    `statistics.collecting(batch_stats)`: each layer then reports the moments of its microbatch, its
    momentum and the kind of variance it stores, instead of updating its running statistics. The
    model does not have to change, and each microbatch starts from the same `batch_stats`:

        optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
        statistics = nj.optim.accumulate()
        state = optimizer.init(params)
        seen = statistics.init(batch_stats, state)
        differentiate = jax.value_and_grad(loss_fn, has_aux=True)
        for x in microbatches:
            asked = statistics.collecting(batch_stats)
            (loss, new), gradients = differentiate(params, asked, x)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            batch_stats, seen = statistics.update(new, seen, batch_stats, state)

    - `init(batch_stats, state)` returns the accumulator's state. `state` is the optimizer's state,
      which contains `MultiSteps` at any depth.
    - `collecting(batch_stats)` returns the `batch_stats` to call the model with. For an nnx module,
      call `statistics.collecting(model)` once before training.
    - `update(new, seen, batch_stats, state, *, count=1)` returns the running statistics, which only
      change after the last microbatch, and the accumulator's new state. It reads from `state` which
      microbatch is the last, and which ones were skipped (`should_skip_update_fn`), so that it
      skips them too. Therefore pass the *new* state of the optimizer.

    `new` is the `batch_stats` that the model returned. Masks, microbatches of different sizes and
    momentum schedules work without further arguments. Other leaves, such as `u` and `sigma` of
    spectral norm, are taken from the last microbatch.

    Layers of other libraries, such as Flax's, do not report anything. For these, pass their
    momentum, and call the model with unchanged `batch_stats`. The statistics of a microbatch are
    then recovered from the new running statistics, as :math:`\mu_i = (\mu'_{\mathrm{new}} - m \mu')
    / (1 - m)`. In this case, `new` may also have `Moments` in place of a layer's dict, with a count
    for each feature (masks).

    Args:
      momentum: "layers" to use the momentum that each layer reports. For layers that do not report
        theirs, pass the momentum of all these layers: a number below 1, or None for statistics with
        a `count`. If a microbatch would have a negative variance with it, this is an error, or NaN
        under `jax.jit`; but a wrong momentum may also go unnoticed.
      running_var: the kind of variance that these layers store, if you pass a momentum. "unbiased"
        requires exact counts, and therefore `Moments`.

    Returns:
      The pair `(init, update)`, with the method `collecting`; all of them work under `jax.jit`,
      `lax.scan`, `pmap` and `shard_map`. `count` is the number of examples in the microbatch. Pass
      it together with a momentum if it varies or may be 0.

    Raises:
      ValueError, TypeError: if a layer did not report its momentum; if trees do not match, with the
        path of the leaf; if the state has no `MultiSteps`, or several; with a given momentum, if
        statistics are in bfloat16, which is too imprecise. Outside of `jax.jit`: if statistics are
        not finite, or impossible with the given momentum. If a layer changed its statistics without
        reporting, and this shows only in a compiled program, its statistics become NaN.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, optax
      >>> params, batch_stats = nj.batch_norm_init(1)
      >>> optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
      >>> statistics = nj.optim.accumulate()
      >>> state = optimizer.init(params)
      >>> seen = statistics.init(batch_stats, state)
      >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])):
      ...     asked = statistics.collecting(batch_stats)
      ...     _, new = nj.batch_norm(params, asked, x, train=True, momentum=0.5)
      ...     _, state = optimizer.update(params, state, params)
      ...     batch_stats, seen = statistics.update(new, seen, batch_stats, state)
      >>> print(batch_stats)
      {'mean': Array([2.], dtype=float32), 'var': Array([3.], dtype=float32)}

    References:
      Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), eq. 2.1.
      Ioffe & Szegedy, "Batch Normalization" (2015), section 3.1.
    """
    _checks.choice("accumulate", "running_var", running_var, OPTIONS)
    if momentum is not None and momentum != LAYERS:
        _checks.between("accumulate", "momentum", momentum, 0.0, float(np.nextafter(1, 0)))

    def update(
        new: PyTree,
        seen: AccumulateState,
        batch_stats: PyTree,
        state: optax.OptState,
        *,
        count: ArrayLike = 1,
    ) -> tuple[PyTree, AccumulateState]:
        read = partial(of_layer, count=count, momentum=momentum, running_var=running_var)
        return _update(new, seen, batch_stats, state, read)

    return StatisticsAccumulator(_init, update)


def _init(batch_stats: PyTree, state: optax.OptState) -> AccumulateState:
    batch_stats = plain(batch_stats)
    check_numbers("batch_stats", batch_stats)
    nodes, _ = nodes_of("batch_stats", batch_stats)
    empty = [no_microbatch(node) for node in nodes.values() if is_layer(node)]
    return _state(empty, *steps_of(state))


def _update(
    new: PyTree,
    seen: AccumulateState,
    batch_stats: PyTree,
    state: optax.OptState,
    read: Callable[..., Microbatch],
) -> tuple[PyTree, AccumulateState]:
    mini_step, gradient_step = steps_of(state)
    stepped = gradient_step != seen.gradient_step
    taken = stepped | (mini_step != seen.mini_step)
    new = plain(new)
    if not isinstance(taken, Tracer) and taken:
        check_numbers("new", new)
    news, _ = nodes_of("new", new)
    nodes, structure = nodes_of("batch_stats", plain(batch_stats))
    check_match(news, nodes)
    before = map(Microbatch, seen.moments, seen.rules)
    after = []
    for path, old in nodes.items():
        if not is_layer(old):
            nodes[path] = jnp.where(stepped, news[path], old)
            continue
        own = read(path, news[path], old)
        nodes[path], kept = _layer(old, next(before), own, taken, stepped)
        after.append(kept)
    return jax.tree.unflatten(structure, list(nodes.values())), _state(
        after, mini_step, gradient_step
    )


def _layer(
    old: Any, before: Microbatch, own: Microbatch, taken: Array, stepped: Array
) -> tuple[Any, Microbatch]:
    """Returns the statistics of a layer after a microbatch, and its accumulated microbatches."""
    running = {leaf: old[leaf] for leaf in old if leaf != POPULATION}
    empty = no_microbatch(running)
    merged = select(taken, before.merged(own), before)
    new = select(stepped, merged.applied(running), running)
    if POPULATION in old:
        new[POPULATION] = empty
    return type(old)(new), select(stepped, empty, merged)


def _state(layers: list[Microbatch], mini_step: Array, gradient_step: Array) -> AccumulateState:
    # Converted to JAX arrays, as a lax.scan carry and a donated argument require.
    layers = jax.tree.map(jnp.asarray, layers)
    moments, rules = (tuple(parts) for parts in zip(*layers, strict=True)) if layers else ((), ())
    return AccumulateState(moments, mini_step, gradient_step, rules)
