"""How far a layer's outputs at inference are from those in training: its running statistics beside a batch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _checks
from normjax._trees import STATISTICS, is_nnx
from normjax.diagnostics._findings import Finding, Severity
from normjax.diagnostics._layers import Layer, Values
from normjax.diagnostics._rules import at_the_start, channels
from normjax.statistics.models import Layers, Model, open_model
from normjax.statistics.passes import Step, compile_step
from normjax.statistics.population import POPULATION, empty_population

WARNING = 0.25  # deviations: below that, healthy networks vary from batch to batch
ERROR = 1.0  # inference differs from training by as much as one example differs from another
CHANCE = 3.0  # times what the choice of the batch's examples makes on average


def with_batch_statistics(apply_fn: Callable[[Any, Any], Any], variables: Any, batch: Any) -> Any:
    """Returns the variables with a batch's statistics; NaN where none was seen, inf where they are not finite."""
    if is_nnx(variables):
        from flax import nnx

        variables = nnx.clone(variables)  # which is updated itself
    try:
        model = open_model(variables)
        layers = _collect(compile_step(apply_fn, model), model, batch)
    except (TypeError, ValueError) as error:
        said = str(error)
        if said.startswith("recalibrate: "):  # whose machinery it is
            raise type(error)(said.replace("recalibrate", "report", 1)) from None
        raise
    return model.finish(layers)


def _collect(step: Step, model: Model, batch: Any) -> Layers:
    """Returns each layer's statistics of the batch: what it collects, or what it moves its running ones towards.

    A layer of another library knows nothing of populations and returns m old + (1 - m) batch. From
    0 that is (1 - m) batch, from 1 it is m more, which says what m is.
    """
    low, high = (
        step(model.static, model.arrays, _started(model.layers, start), batch)[0]
        for start in (0, 1)
    )
    found, saw = {}, False
    for path, layer in model.layers.items():
        found[path] = dict(layer)
        population = low[path][POPULATION]
        for leaf, collected in zip(STATISTICS, population.statistics(), strict=True):
            moved = 1 - (high[path][leaf] - low[path][leaf])
            seen = jnp.where(
                population.seen[0], collected, (low[path][leaf] / moved).astype(collected.dtype)
            )
            there = population.seen[0] | ~(jnp.abs(moved) < 1e-6)
            found[path][leaf] = jnp.where(
                there, jnp.where(jnp.isfinite(seen), seen, jnp.inf), jnp.nan
            )
            saw |= bool(there.any())
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
    """Returns how many examples a batch has: the longest of the first axes of its arrays."""
    return max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), default=1)


def gap_of(running: Values, batch: Values, epsilon: float) -> np.ndarray:
    r"""Returns the distance of a channel's outputs by running and by batch statistics, `(*features)`.

    Of an input with the batch's moments, the root mean square of what the two normalizations make
    of it differently: the offset of the mean, and the factor of the deviation, both in deviations
      of the output.
    """
    (mean, var), (seen, spread) = ((values["mean"], values["var"]) for values in (running, batch))
    with np.errstate(all="ignore"):
        offset = np.abs(seen - mean) / np.sqrt(var + epsilon)
        factor = np.sqrt(spread) * (1 / np.sqrt(spread + epsilon) - 1 / np.sqrt(var + epsilon))
        return np.sqrt(offset**2 + factor**2)


def finding(
    layer: Layer, running: Values, batch: Values, gaps: np.ndarray, examples: float
) -> Finding | None:
    """Returns what there is to say of a layer's gap, where chance does not explain it."""
    if np.isinf(batch["var"]).any() or np.isinf(batch["mean"]).any():
        bad = ~np.isfinite(batch["var"])
        message = f"the batch's statistics of {bad.sum()} of {bad.size} channels are not finite{channels(bad)}"
        advice = "Look for NaN in the batch and in what comes before the first such layer; mask what does not count"
        return Finding(layer.path, "non-finite", "error", message, advice)
    gap = rms(gaps)
    # variances 1 / n of a mean, 1 / 2n of a deviation
    limit = max(WARNING, CHANCE * math.sqrt(1.5 / examples))
    if gap is None or gap < limit:
        return None
    worst = np.unravel_index(int(np.nanargmax(gaps)), gaps.shape)
    kept, seen = (
        f"mean {values['mean'][worst]:.3g}, var {values['var'][worst]:.3g}"
        for values in (running, batch)
    )
    message = f"outputs at inference are {gap:.2g} standard deviations from those by the batch's statistics; "
    message += f"worst in channel {', '.join(map(str, map(int, worst)))}: {kept} kept, {seen} seen"
    if at_the_start(running):
        advice = "Statistics are as at the start: train, or call nj.recalibrate, before inference"
        return Finding(layer.path, "train-eval-gap", "note", message, advice)
    advice = "Call nj.recalibrate before inference; where training left it: larger batches, less momentum, more steps"
    severity: Severity = "error" if gap >= max(ERROR, 2 * limit) else "warning"
    return Finding(layer.path, "train-eval-gap", severity, message, advice)


def rms(gaps: np.ndarray) -> float | None:
    """Returns the layer's gap: the root mean square over the channels that there is one of; None without any."""
    gaps = gaps[np.isfinite(gaps)]
    return float(np.sqrt(np.mean(gaps**2))) if gaps.size else None
