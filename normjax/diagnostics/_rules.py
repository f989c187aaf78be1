"""What can be wrong with a layer, read from its parameters and running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np

from normjax.diagnostics._findings import Finding, Severity
from normjax.diagnostics._layers import Layer, Values

DEAD = 1e-2  # of epsilon: the layer's output varies by a tenth of what its scale says, and less
FAR = 1e2  # times the layer's median: of healthy layers, channels lie within a factor of some 10
LARGE, HUGE = 1e1, 1e4  # nothing smaller explodes; 6 deviations of 1e4 are where float16 ends
LOST = 1e8  # float32 goes in steps of 8 there: what other channels add to these is lost
NEAR_ZERO = 1e-3  # times the layer's median: a channel that the next layer does not hear
SHARE = 1e-2  # of the channels: fewer are for pruning rather than for worry
# of the scales are negative: they have crossed 0, or spread from it, and some are on their way
BOTH_SIDES = 0.1

Rule = Callable[[Layer, Values, float], Iterator[Finding]]


def findings(layer: Layer, epsilon: float) -> Iterator[Finding]:
    """Yields what the rules have to say about a layer."""
    values = layer.values
    for rule in (
        _not_finite,
        _negative_variance,
        _dead,
        _deaf,
        _exploding,
        _near_zero,
        _not_stored,
    ):
        yield from rule(layer, values, epsilon)


def _not_finite(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    bad = {name: ~np.isfinite(value) for name, value in values.items()}
    bad = {name: where for name, where in bad.items() if where.any()}
    if bad:
        seen = ", ".join(
            f"{where.sum()} of {where.size} in {name}{channels(where)}"
            for name, where in bad.items()
        )
        advice = "Go back to a checkpoint from before; jax.config.update('jax_debug_nans', True) shows where it starts"
        yield Finding(layer.path, "non-finite", "error", f"NaN or infinite: {seen}", advice)


def _negative_variance(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" in values and (bad := values["var"] < 0).any():
        message = f"{bad.sum()} of {bad.size} variances are negative, down to {values['var'][bad].min():.3g}"
        advice = "Replace them by nj.recalibrate; merge variances by nj.merge_moments, never by differences"
        yield Finding(layer.path, "negative-variance", "error", message + channels(bad), advice)


def _dead(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" not in values:
        return
    var = np.atleast_1d(values["var"])
    dead = _is_dead(var, epsilon)
    if dead.any():
        against = "" if dead.all() else f" against a median of {np.nanmedian(var[~dead]):.3g}"
        message = f"the input of {dead.sum()} of {dead.size} channels hardly varies: var up to {var[dead].max():.3g}"
        advice = "Look at what feeds them: dead ReLUs, kernels decayed to 0, constant inputs; revive or prune them"
        yield Finding(
            layer.path,
            "dead-channels",
            "error" if dead.all() else "warning",
            message + against + channels(dead),
            advice,
        )


def _deaf(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    """Layers whose own parameters make their output a constant."""
    advice = "Start these parameters anew; train them with a lower learning rate, and without weight decay"
    if layer.kind == "dynamic tanh" and np.any(values.get("alpha", np.ones(1)) == 0):
        yield Finding(
            layer.path,
            "dead-channels",
            "error",
            "alpha is 0: the output is the bias, whatever x is",
            advice,
        )
    if "threshold" in values:
        scale, bias = values.get("scale", np.ones(1)), values.get("bias", np.zeros(1))
        # Mean squares are 1: above 6 is at most 1 in 36. Scales on their way from 0 are no concern
        # of this rule.
        dead = np.atleast_1d(values["threshold"] > bias + 6 * np.maximum(np.abs(scale), 0.1))
        if dead.any():
            message = f"{dead.sum()} of {dead.size} channels hardly ever exceed their threshold{channels(dead)}"
            yield Finding(
                layer.path, "dead-channels", "error" if dead.all() else "warning", message, advice
            )


def _exploding(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    sizes: Values = {}
    if {"mean", "var"} <= values.keys() and values["mean"].shape == values["var"].shape:
        var = np.maximum(values["var"], 0)
        live = np.where(_is_dead(np.atleast_1d(var), epsilon).reshape(var.shape), np.nan, 1)
        sizes["the input"] = np.sqrt(var + np.abs(values["mean"]) ** 2) * live
    if "scale" in values:
        sizes["scale"] = np.abs(values["scale"])
    for name, size in sizes.items():
        size = np.atleast_1d(np.where(np.isfinite(size), size, np.nan))
        usual = _median(np.where(size > 0, size, np.nan))
        bad = ((size >= FAR * usual) & (size >= LARGE)) | (size >= HUGE)
        if bad.any():
            against = (
                f", against a median of {np.nanmedian(size[~bad]):.3g}" if bad.mean() < 0.5 else ""
            )
            message = f"{name} of {bad.sum()} of {bad.size} channels is as large as {np.nanmax(size):.3g}{against}"
            advice = "Lower the learning rate or clip gradients; scale the inputs; go on from a checkpoint before it"
            severity: Severity = "error" if np.nanmax(size) >= LOST else "warning"
            yield Finding(
                layer.path, "exploding-channels", severity, message + channels(bad), advice
            )


def _near_zero(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "scale" not in values:
        return
    scale = np.atleast_1d(values["scale"])
    size = np.abs(scale)
    if size.size and (size.max() <= NEAR_ZERO):
        message = (
            f"all {size.size} scales are 0"
            if size.max() == 0
            else f"no scale is above {size.max():.3g}"
        )
        advice = "Right at the start of a residual branch's last layer, or where 1 is added; else the layer is silent"
        yield Finding(layer.path, "zero-scale", "note", message, advice)
        return
    near = size <= NEAR_ZERO * _median(np.where(size > 0, size, np.nan))
    if near.any():
        crossed = np.mean(np.real(scale) < 0) >= BOTH_SIDES
        severity: Severity = "note" if crossed or near.mean() < SHARE else "warning"
        message = f"scale of {near.sum()} of {near.size} channels is near 0, up to {size[near].max():.3g} against "
        message += f"a median of {np.nanmedian(size[~near]):.3g}{channels(near)}"
        advice = "These channels add nothing: prune them; if that was not meant, leave scale out of weight decay"
        yield Finding(layer.path, "near-zero-scale", severity, message, advice)


def _not_stored(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    learned = [
        name for name in ("scale", "bias") if name in values and len(np.unique(values[name])) > 1
    ]
    if learned and at_the_start(values):
        message = (
            f"mean is 0 and var is 1 as at the start, and {' and '.join(learned)} has been trained"
        )
        advice = "Keep the batch_stats that each step returns; nj.recalibrate finds them for these weights"
        yield Finding(layer.path, "statistics-not-stored", "warning", message, advice)


def at_the_start(values: Values) -> bool:
    """Whether running statistics are those of an init function."""
    return {"mean", "var"} <= values.keys() and bool(
        np.all(values["mean"] == 0) and np.all(values["var"] == 1)
    )


def channels(where: np.ndarray) -> str:
    """Returns which channels are meant, in brackets; nothing where there is only one, or all are."""
    indices = np.argwhere(where)
    if where.ndim == 0 or where.all():
        return ""
    shown = ", ".join(
        str(index[0]) if len(index) == 1 else str(tuple(map(int, index))) for index in indices[:5]
    )
    return f" (channel{'s' * (len(indices) > 1)} {shown}{f' and {len(indices) - 5} more' * (len(indices) > 5)})"


def _is_dead(var: np.ndarray, epsilon: float) -> np.ndarray:
    """Whether a variance is small beside epsilon, or the median of those that are not."""
    small = var <= DEAD * epsilon
    usual = _median(np.where(small | ~np.isfinite(var), np.nan, var))
    return (var >= 0) & (small | (var <= usual / (FAR * LARGE) ** 2))


def _median(values: np.ndarray) -> np.ndarray:
    """The median over the last axis, without NaN: a layer that is stacked in a scan has one for each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of medians of nothing
        return np.nanmedian(values, -1, keepdims=True)
