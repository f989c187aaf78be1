"""Measures how far inference differs from training: running against batch statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _checks
from normjax._trees import STATISTICS, is_nnx
from normjax.diagnostics.findings import Finding, Severity
from normjax.diagnostics.report._layers import Layer, Values
from normjax.diagnostics.report._rules import at_the_start, channels
from normjax.statistics.models import Layers, Model, open_model
from normjax.statistics.passes import Step, compile_step, raise_if_a_part_fits
from normjax.statistics.population import POPULATION, empty_population

WARNING = 0.25  # in deviations; healthy networks have smaller gaps, from batch to batch
ERROR = 1.0  # in deviations; here inference differs from training as much as two examples differ
CHANCE = 3.0  # a warning needs this multiple of the average gap of a random batch


def with_batch_statistics(apply_fn: Callable[[Any, Any], Any], variables: Any, batch: Any) -> Any:
    """Returns the variables with a batch's statistics: NaN if unknown, infinity if not finite."""
    if is_nnx(variables):
        from flax import nnx

        variables = nnx.clone(variables)  # the module itself would be updated
    try:
        model = open_model(variables)
        step = compile_step(apply_fn, model)
        try:
            layers = _collect(step, model, batch)
        except Exception:
            raise_if_a_part_fits(step, model, _started(model.layers, 0), batch, 0)
            raise
    except (TypeError, ValueError) as error:
        said = str(error)
        if said.startswith("recalibrate: "):  # the functions used here are those of recalibrate
            raise type(error)(said.replace("recalibrate", "report", 1)) from None
        raise
    return model.finish(layers)


def _collect(step: Step, model: Model, batch: Any) -> Layers:
    """Returns each layer's statistics of the batch.

    normjax's layers collect them. Layers of other libraries return m * old + (1 - m) * b for
    batch statistics b: (1 - m) * b from 0, and (1 - m) * b + m from 1, so the difference is m.
    """
    low, _ = step(model.static, model.arrays, _started(model.layers, 0), batch)
    high, _ = step(model.static, model.arrays, _started(model.layers, 1), batch)
    found, saw = {}, False
    for path, layer in model.layers.items():
        found[path] = dict(layer)
        population = low[path][POPULATION]
        for leaf, collected in zip(STATISTICS, population.statistics(), strict=True):
            moved = 1 - (high[path][leaf] - low[path][leaf])
            recovered = (low[path][leaf] / moved).astype(collected.dtype)
            value = jnp.where(population.seen[0], collected, recovered)
            value = jnp.where(jnp.isfinite(value), value, jnp.inf)
            known = population.seen[0] | ~(jnp.abs(moved) < 1e-6)
            found[path][leaf] = jnp.where(known, value, jnp.nan)
            saw |= bool(known.any())
    if not saw:
        _checks.raise_error(
            "report",
            "no layer saw the batch",
            expected="a forward pass in training mode that returns new statistics",
            got=f"{len(found)} layer(s) that did not update, the first of them {min(found)}",
            fix="Pass train=True (linen: use_running_average=False; nnx: model.train())",
        )
    return found


def _started(layers: Layers, value: float) -> Layers:
    start = {}
    for path, layer in layers.items():
        statistics = {leaf: jnp.full_like(layer[leaf], value) for leaf in STATISTICS}
        start[path] = layer | statistics | {POPULATION: empty_population(layer, "merged", False)}
    return start


def examples_in(batch: Any) -> int:
    """Returns the number of examples: the size of the longest first axis in the batch."""
    return max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), default=1)


def gap_of(running: Values, batch: Values, epsilon: float) -> np.ndarray:
    r"""Returns the distance between outputs by running and by batch statistics, `(*features)`.

    It is the root mean square difference between an input normalized by either, if the input has
    the moments of the batch. The difference of the means is an offset, that of the deviations a
    factor; both are in deviations of the output.
    """
    mean, var = running["mean"], running["var"]
    own_mean, own_var = batch["mean"], batch["var"]
    with np.errstate(all="ignore"):
        offset = np.abs(own_mean - mean) / np.sqrt(var + epsilon)
        factor = np.sqrt(own_var) * (1 / np.sqrt(own_var + epsilon) - 1 / np.sqrt(var + epsilon))
        return np.sqrt(offset**2 + factor**2)


def finding(
    layer: Layer, running: Values, batch: Values, gaps: np.ndarray, examples: float
) -> Finding | None:
    """Returns the finding about a layer's gap; None if chance may explain it."""
    if np.isinf(batch["var"]).any() or np.isinf(batch["mean"]).any():
        return _not_finite(layer, ~np.isfinite(batch["var"]))
    gap = rms(gaps)
    # In units of the variance, the mean of n examples has a variance of 1 / n, and their standard
    # deviation one of 1 / 2n.
    limit = max(WARNING, CHANCE * math.sqrt(1.5 / examples))
    if gap is None or gap < limit:
        return None
    worst = np.unravel_index(int(np.nanargmax(gaps)), gaps.shape)
    channel = ", ".join(str(int(i)) for i in worst)
    message = (
        f"outputs at inference are {gap:.2g} standard deviations from outputs by the batch's "
        f"statistics; worst in channel {channel}: {_moments(running, worst)} stored, "
        f"{_moments(batch, worst)} in the batch"
    )
    if at_the_start(running):
        advice = "Statistics are as initialized: train, or call nj.recalibrate, before inference"
        return Finding(layer.path, "train-eval-gap", "note", message, advice)
    advice = (
        "Call nj.recalibrate before inference; in training, use larger batches, less momentum or "
        "more steps"
    )
    severity: Severity = "error" if gap >= max(ERROR, 2 * limit) else "warning"
    return Finding(layer.path, "train-eval-gap", severity, message, advice)


def _not_finite(layer: Layer, bad: np.ndarray) -> Finding:
    return Finding(
        layer.path,
        "non-finite",
        "error",
        f"the batch's statistics of {bad.sum()} of {bad.size} channels are not finite"
        f"{channels(bad)}",
        "Look for NaN in the batch and before the first such layer; mask padding",
    )


def _moments(values: Values, channel: tuple[Any, ...]) -> str:
    return f"mean {values['mean'][channel]:.3g}, var {values['var'][channel]:.3g}"


def rms(gaps: np.ndarray) -> float | None:
    """Returns the root mean square of the channels' gaps that are finite; None without any."""
    gaps = gaps[np.isfinite(gaps)]
    return float(np.sqrt(np.mean(gaps**2))) if gaps.size else None
