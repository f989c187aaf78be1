"""Replaces running statistics by statistics of a population, over a stream of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from normjax import _checks, _extras
from normjax._trees import STATISTICS
from normjax.statistics.elements import abs2
from normjax.statistics.models import FUNCTION, Layer, Layers, Model, open_model
from normjax.statistics.passes import Step, compile_step, one_pass
from normjax.statistics.population import POPULATION, Estimate, empty_population

Variables = TypeVar("Variables")
Batch = TypeVar("Batch")

# Passes move means, in deviations, and variances, relative to themselves. Below SETTLED they have
# converged: that is as precise as variances are. Devices that add up in varying order may never get
# there, but stay far below ADRIFT. Above ADRIFT there is no fixed point.
SETTLED, ADRIFT = 1e-5, 1e-2
EPSILON = 1e-5


def recalibrate(
    apply_fn: Callable[[Variables, Batch], Any],
    variables: Variables,
    batches: Iterable[Batch],
    *,
    estimate: Estimate = "merged",
    layer_by_layer: bool = False,
    progress: bool = False,
) -> Variables:
    r"""Replaces running statistics by those of a population, computed batch by batch.

    Running statistics lag behind the weights. Call it when weights or data at inference differ from
    training: after averaging weights (EMA, SWA, schedule-free), for data from another domain, after
    training with small batches or too much momentum. With `n_b` elements, mean `\mu_b` and biased
    variance `\sigma_b^2` of a feature in batch b, "merged" computes the moments of all elements
    together, and "averaged" is the paper's Algorithm 2:

    .. math:: \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad
              \sigma^2 = \frac{\sum_b n_b (\sigma_b^2 + |\mu_b - \mu|^2)}{\sum_b n_b}

    .. math:: \mu = \operatorname{mean}_b \mu_b, \qquad
              \sigma^2 = \operatorname{mean}_b \frac{n_b}{n_b - 1} \sigma_b^2

    By default, the layers before a layer normalize a batch *by that batch's statistics*, as in
    training. This takes one pass over the batches. Layer by layer, they normalize by the new
    statistics, as at inference. This takes one pass more than there are layers in sequence. If
    batches are large, the two hardly differ.

    Args:
      apply_fn: a linen module, or `apply_fn(variables, batch)`, which does a forward pass in
        training mode. It returns `(anything, batch_stats)`, as a functional model does, or what
        linen's `apply(..., mutable=["batch_stats"])` returns; for an nnx module, it may return
        anything. It is compiled
        once for each function: arrays that it closes over are constants.
      variables: `{"params": ..., "batch_stats": ...}` (all collections of linen), the pair
        `(params, batch_stats)`, batch_stats alone, or a `flax.nnx.Module` in training mode.
      batches: arrays, or trees of them, as `apply_fn` takes them; the last may be smaller. A
        sharded array is one batch.
      estimate: "merged" or "averaged". The variance of "merged" is biased or unbiased, according to
        the layers' `running_var`.
      layer_by_layer: see above. It iterates over `batches` several times: pass a list, not a
        generator. `apply_fn` may then also run in inference mode, without dropout.
      progress: whether to show a bar; it needs `rich`.

    Returns:
      The variables with new statistics, in the dtypes of the old ones. An nnx module is updated in
      place at the end, and returned. Sums are in float32 or wider, with compensation of rounding
      errors, so that the number of batches costs neither memory nor digits. A cumulative layer's
      `count` becomes the number of batches. The statistics of layers that do not train (`frozen`),
      or that no element reaches, do not change. Batch renorm runs as batch norm, since its
      correction depends on the statistics that are replaced.

    Raises:
      ValueError, TypeError: for a model without batch statistics, or whose layers do not update or
        are not normjax's; for no batches, or a generator with `layer_by_layer`; for batches of
        several arrays (images and labels) if `apply_fn` takes one of them; for statistics that are
        not finite, with their path and batch.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(1)
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> apply_fn = lambda variables, x: nj.batch_norm(*variables, x, train=True)
      >>> params, batch_stats = nj.recalibrate(apply_fn, (params, batch_stats), batches)
      >>> print(batch_stats["mean"], batch_stats["var"])
      [4.] [5.]

    References:
      Ioffe & Szegedy, "Batch Normalization" (2015), Algorithm 2. After averaging weights: Izmailov
      et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018), section
      3.2. Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
    """
    _checks.choice(FUNCTION, "estimate", estimate, get_args(Estimate))
    _check_batches(batches, layer_by_layer)
    model = open_model(variables)
    _refuse_non_finite_start(model.layers)
    step = compile_step(apply_fn, model)
    with _Bar(progress) as bar:
        if not layer_by_layer:
            start = _with_empty_populations(model.layers, estimate, layer_by_layer=False)
            return model.finish(_settle(one_pass(step, model, start, bar(batches))))
        return model.finish(_fixed_point(step, model, batches, estimate, bar))


def _fixed_point(
    step: Step, model: Model, batches: Iterable[Any], estimate: Estimate, bar: Callable
) -> Layers:
    """Repeats passes, each with the statistics of the last, until the statistics converge."""
    layers = model.layers
    # After pass k, the first k layers in sequence are right, also the stacked layers of a scan.
    passes = 2 + sum(math.prod(jnp.shape(layer["var"])[:-1]) for layer in layers.values())
    movement: dict[str, float] = {}
    for index in range(passes):
        start = _with_empty_populations(layers, estimate, layer_by_layer=True)
        new = _settle(one_pass(step, model, start, bar(batches, index)))
        movement = {path: float(_movement(layers[path], new[path])) for path in layers}
        layers = new
        if max(movement.values()) <= SETTLED:
            return layers
    worst = max(movement, key=lambda path: movement[path])
    if movement[worst] > ADRIFT:
        _checks.raise_error(
            FUNCTION,
            "the statistics do not settle",
            expected=f"no change after {passes} passes for {len(layers)} layer(s)",
            got=f"{worst}, which still changes by {movement[worst]:.1%}",
            fix="Where a layer's input depends on its own output, or batches differ from pass to "
            "pass, there may be no such statistics: use layer_by_layer=False",
        )
    return layers


@partial(jax.jit, static_argnames=("estimate", "layer_by_layer"))  # sharded as in a step
def _with_empty_populations(layers: Layers, estimate: Estimate, *, layer_by_layer: bool) -> Layers:
    return {
        path: layer | {POPULATION: empty_population(layer, estimate, layer_by_layer)}
        for path, layer in layers.items()
    }


@jax.jit
def _settle(layers: Layers) -> Layers:
    """Returns the layers with their populations' statistics, old ones for missing features."""
    settled = {}
    for path, layer in layers.items():
        found = zip(STATISTICS, layer[POPULATION].statistics(), layer[POPULATION].seen, strict=True)
        new = {
            leaf: jnp.where(seen, value.astype(layer[leaf].dtype), layer[leaf])
            for leaf, value, seen in found
        }
        settled[path] = {leaf: value for leaf, value in (layer | new).items() if leaf != POPULATION}
    return settled


@jax.jit
def _movement(old: Layer, new: Layer) -> Float[Array, ""]:
    """Returns how far statistics moved: means in deviations, variances relative to themselves."""
    var = new["var"] + EPSILON
    mean_moved = jnp.sqrt(abs2(new["mean"] - old["mean"].astype(new["mean"].dtype)) / var)
    return jnp.maximum(jnp.max(mean_moved), jnp.max(jnp.abs(new["var"] - old["var"]) / var))


def _refuse_non_finite_start(layers: Layers) -> None:
    for path, layer in layers.items():
        for leaf in STATISTICS:
            if not bool(jnp.all(jnp.isfinite(layer[leaf]))):
                _checks.raise_error(
                    FUNCTION,
                    "the running statistics to start from are not finite",
                    expected="finite ones, which features that no element reaches keep",
                    got=f"NaN or infinity in {path}[{leaf!r}]",
                    fix="Start from new ones: mean 0, variance 1",
                )


def _check_batches(batches: Any, layer_by_layer: bool) -> None:
    if not isinstance(batches, Iterable) or hasattr(batches, "dtype"):
        _checks.raise_error(
            FUNCTION,
            "batches is not an iterable of batches",
            expected="a list, a generator or a data loader",
            got=f"{type(batches).__name__}",
            fix="Pass [batch] for a single one, list(batches) for stacked ones",
            kind=TypeError,
        )
    if layer_by_layer and isinstance(batches, Iterator):
        _checks.raise_error(
            FUNCTION,
            "layer by layer goes through the batches several times, and these can be had once",
            expected="an iterable that starts anew each time, such as a list or a data loader",
            got=f"a {type(batches).__name__}",
            fix="Pass list(batches) if they fit into memory, or an object whose __iter__ makes a "
            "new generator",
            kind=TypeError,
        )


class _Bar:
    """An optional progress bar: `bar(batches)` iterates over the batches and shows their number."""

    def __init__(self, shown: bool):
        self.progress = _progress() if shown else None

    def __enter__(self) -> _Bar:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, batches: Iterable[Any], index: int | None = None) -> Iterable[Any]:
        if self.progress is None:
            return batches
        title = FUNCTION if index is None else f"{FUNCTION}, pass {index + 1}"
        return self.progress.track(batches, description=title)


def _progress() -> Any:
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError as error:
        _extras.raise_for_missing(
            FUNCTION, "progress=True shows a bar of", error, otherwise=", or pass progress=False"
        )
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
