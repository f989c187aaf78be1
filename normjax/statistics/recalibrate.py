"""Recomputes running statistics over a stream of batches."""

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

# How much a pass may change the means, in standard deviations, and the variances, relatively. Below
# SETTLED, the statistics have converged within the precision of variances. Devices that sum in
# varying order may not reach that, but stay far below ADRIFT. Above ADRIFT, there is no fixed
# point.
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
    r"""Recomputes the running statistics of a model over batches, with fixed weights.

    During training, running statistics lag behind the weights. Call this function when weights or
    data at inference differ from training: after averaging weights (EMA, SWA, schedule-free), for
    data from another domain, or after training with small batches or too large a momentum. If a
    feature has :math:`n_b` elements in batch b, with mean :math:`\mu_b` and biased variance
    :math:`\sigma_b^2`, then "merged" computes the moments of all elements together, and "averaged"
    is Algorithm 2 of the paper:

    .. math:: \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad
              \sigma^2 = \frac{\sum_b n_b (\sigma_b^2 + |\mu_b - \mu|^2)}{\sum_b n_b}

    .. math:: \mu = \operatorname{mean}_b \mu_b, \qquad
              \sigma^2 = \operatorname{mean}_b \frac{n_b}{n_b - 1} \sigma_b^2

    By default, every layer normalizes each batch *by its batch statistics*, as in training, and one
    pass over the batches suffices. With `layer_by_layer`, the inputs of a layer are normalized by
    the new statistics of the layers before it, as at inference. This takes one more pass than there
    are layers in sequence. If batches are large, the results hardly differ.

    Args:
      apply_fn: a linen module, or a function `apply_fn(variables, batch)` that runs a forward pass
        in training mode. It returns `(anything, batch_stats)`, or the result of linen's `apply(...,
        mutable=["batch_stats"])`; for an nnx module, it may return anything. Each function is
        compiled once, with arrays that it closes over as constants.
      variables: `{"params": ..., "batch_stats": ...}` (all linen collections), the pair `(params,
        batch_stats)`, `batch_stats` alone, or a `flax.nnx.Module` in training mode.
      batches: an iterable of batches, which are arrays or trees of arrays that `apply_fn` accepts.
        The last batch may be smaller. A sharded array is one batch.
      estimate: "merged" or "averaged". The variance of "merged" is biased or unbiased, according to
        the layers' `running_var`.
      layer_by_layer: see above. It iterates over `batches` several times, so pass a list, not a
        generator. `apply_fn` may then also run in inference mode, without dropout.
      progress: whether to show a progress bar, which requires the package `rich`.

    Returns:
      The variables with new running statistics, in the dtypes of the old ones. An nnx module is
      updated in place at the end, and returned. Sums are in float32 or wider, with compensation of
      rounding errors, so neither memory nor precision depends on the number of batches. The `count`
      of a cumulative layer becomes the number of batches. The statistics of `frozen` layers, and of
      layers without any element that counts, do not change. Batch renorm runs as batch norm, since
      its correction depends on the statistics that are being recomputed.

    Raises:
      ValueError, TypeError: if the model has no running statistics, or its layers do not update or
        are not from normjax; if there are no batches, or a generator with `layer_by_layer`; if
        batches have several arrays (images and labels) and `apply_fn` accepts only one; if
        statistics are not finite. The error names the path and the batch.

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
    """Repeats passes, each with the statistics of the previous one, until they converge."""
    layers = model.layers
    # After pass k, the first k layers in sequence are exact, counting each layer of a scan.
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
            "the statistics do not converge",
            expected=f"no change after {passes} passes for {len(layers)} layer(s)",
            got=f"{worst}, which still changes by {movement[worst]:.1%}",
            fix="Use layer_by_layer=False: there may be no fixed point if a layer's input depends "
            "on its own output, or if batches differ from pass to pass",
        )
    return layers


# Under jit, so that leaves are sharded as in a step.
@partial(jax.jit, static_argnames=("estimate", "layer_by_layer"))
def _with_empty_populations(layers: Layers, estimate: Estimate, *, layer_by_layer: bool) -> Layers:
    return {
        path: layer | {POPULATION: empty_population(layer, estimate, layer_by_layer)}
        for path, layer in layers.items()
    }


@jax.jit
def _settle(layers: Layers) -> Layers:
    """Returns the layers with the collected statistics; features without elements keep the old."""
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
    """Returns the largest change, of means in standard deviations and of variances relatively."""
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
                    expected="finite running statistics, since features without elements keep them",
                    got=f"NaN or infinity in {path}[{leaf!r}]",
                    fix="Start from mean 0 and variance 1",
                )


def _check_batches(batches: Any, layer_by_layer: bool) -> None:
    if not isinstance(batches, Iterable) or hasattr(batches, "dtype"):
        _checks.raise_error(
            FUNCTION,
            "batches is not an iterable of batches",
            expected="a list, a generator or a data loader",
            got=f"{type(batches).__name__}",
            fix="Pass [batch] for a single batch, list(batches) for stacked batches",
            kind=TypeError,
        )
    if layer_by_layer and isinstance(batches, Iterator):
        _checks.raise_error(
            FUNCTION,
            "layer_by_layer needs the batches several times, but an iterator gives them once",
            expected="an iterable that restarts each time, such as a list or a data loader",
            got=f"a {type(batches).__name__}",
            fix="Pass list(batches) if they fit into memory, or an object whose __iter__ makes a "
            "new generator",
            kind=TypeError,
        )


class _Bar:
    """An optional progress bar: `bar(batches)` iterates over the batches and shows progress."""

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
