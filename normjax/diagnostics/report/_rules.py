"""The rules of `report`: what parameters and running statistics say about a layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np

from normjax.diagnostics.findings import Finding, Severity
from normjax.diagnostics.report._layers import Layer, Values

# If var is this part of epsilon, the output varies by a tenth of the scale.
DEAD = 1e-2
# Times the layer's median; channels of healthy layers are within a factor of some 10.
FAR = 1e2
# Below LARGE nothing explodes; 6 deviations of HUGE overflow float16.
LARGE, HUGE = 1e1, 1e4
# Adjacent float32 numbers differ by 8 here, so smaller terms of a sum are lost.
LOST = 1e8
# Deviations. Adjacent float32 numbers differ by a tenth of a deviation here.
DISTANT = 1e6
# Times the layer's median; such a channel has almost no effect on the next layer.
NEAR_ZERO = 1e-3
# If fewer channels have a scale near 0, they can be pruned; it is not a problem.
SHARE = 1e-2
# If fewer channels are dead, it is not a problem either: an EfficientNet-lite0 that was trained on
# ImageNet has some in 28 of its 49 layers, and up to 1.4% of the channels in 26 of these.
DEAD_SHARE = 5e-2
# If this part of the scales is negative, scales are crossing 0, and some are near it by chance.
BOTH_SIDES = 0.1

Rule = Callable[[Layer, Values, float], Iterator[Finding]]


def findings(layer: Layer, epsilon: float) -> Iterator[Finding]:
    """Yields the findings about a layer."""
    values = layer.values
    for rule in _RULES:
        yield from rule(layer, values, epsilon)


def _not_finite(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    bad = {name: ~np.isfinite(value) for name, value in values.items()}
    if "var" in bad:
        bad["var"] &= values["var"] != np.inf  # which have a rule of their own
    bad = {name: where for name, where in bad.items() if where.any()}
    if bad:
        counts = [
            f"{where.sum()} of {where.size} in {name}{channels(where)}"
            for name, where in bad.items()
        ]
        message = f"NaN or infinite: {', '.join(counts)}"
        advice = (
            "Go back to an earlier checkpoint; jax.config.update('jax_debug_nans', True) shows "
        )
        advice += "where NaN starts"
        yield Finding(layer.path, "non-finite", "error", message, advice)


def _infinite_variance(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" in values and (bad := values["var"] == np.inf).any():
        message = f"{bad.sum()} of {bad.size} variances are infinite{channels(bad)}: the network "
        message += "diverged; at inference their output is the bias, whatever the input is"
        advice = "Go back to an earlier checkpoint: a running variance never gets below infinity "
        advice += "again; look for inputs beyond 1e19, whose squares float32 cannot hold"
        yield Finding(layer.path, "infinite-variance", "error", message, advice)


def _distant_mean(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if not {"mean", "var"} <= values.keys() or values["mean"].shape != values["var"].shape:
        return
    var = np.atleast_1d(values["var"])
    usable = np.isfinite(var) & (var >= 0) & ~dead_channels(var, epsilon)
    deviation = np.sqrt(np.where(usable, var, 1) + epsilon)
    distance = np.where(usable, np.abs(np.atleast_1d(values["mean"])) / deviation, 0)
    bad = (distance > DISTANT) & np.isfinite(distance)
    if bad.any():
        message = f"{bad.sum()} of {bad.size} means lie up to {distance[bad].max():.3g} deviations "
        message += (
            f"from 0{channels(bad)}: float32 holds hardly anything of how their inputs differ"
        )
        advice = (
            "Look for what adds so large a constant before the layer: the network diverged, or "
        )
        advice += "its inputs are not centered"
        yield Finding(layer.path, "distant-mean", "error", message, advice)


def _negative_variance(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" in values and (bad := values["var"] < 0).any():
        least = values["var"][bad].min()
        message = f"{bad.sum()} of {bad.size} variances are negative, down to {least:.3g}"
        advice = (
            "Measure them with nj.recalibrate; merge variances with nj.merge_moments, never by "
        )
        advice += "subtraction"
        yield Finding(layer.path, "negative-variance", "error", message + channels(bad), advice)


def _dead(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" not in values:
        return
    var = np.atleast_1d(values["var"])
    dead = dead_channels(var, epsilon)
    if dead.any():
        against = "" if dead.all() else f" against a median of {np.nanmedian(var[~dead]):.3g}"
        message = f"the input of {dead.sum()} of {dead.size} channels hardly varies: var up to "
        message += f"{var[dead].max():.3g}{against}{channels(dead)}"
        advice = "Look for dead ReLUs, kernels that decayed to 0 or constant inputs before them; "
        advice += "reinitialize or prune them"
        yield Finding(layer.path, "dead-channels", _severity(dead), message, advice)


def _severity(dead: np.ndarray) -> Severity:
    few: Severity = "note" if dead.mean() < DEAD_SHARE else "warning"
    return "error" if dead.all() else few


def _deaf(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    """Yields findings about layers whose own parameters make their output constant."""
    advice = "Reinitialize these parameters; train them with a lower learning rate and without "
    advice += "weight decay"
    if layer.kind == "dynamic tanh" and np.any(values.get("alpha", np.ones(1)) == 0):
        message = "alpha is 0: the output is the bias, whatever x is"
        yield Finding(layer.path, "dead-channels", "error", message, advice)
    if "threshold" in values:
        scale, bias = values.get("scale", np.ones(1)), values.get("bias", np.zeros(1))
        # x has mean square 1, so at most 1 in 36 values exceeds 6. Scales near 0 have another rule.
        dead = np.atleast_1d(values["threshold"] > bias + 6 * np.maximum(np.abs(scale), 0.1))
        if dead.any():
            message = f"{dead.sum()} of {dead.size} channels hardly ever exceed their threshold"
            message += channels(dead)
            yield Finding(layer.path, "dead-channels", _severity(dead), message, advice)


def _exploding(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    sizes: Values = {}
    if {"mean", "var"} <= values.keys() and values["mean"].shape == values["var"].shape:
        var = np.maximum(values["var"], 0)
        live = np.where(dead_channels(np.atleast_1d(var), epsilon).reshape(var.shape), np.nan, 1)
        sizes["the input"] = np.sqrt(var + np.abs(values["mean"]) ** 2) * live
    if "scale" in values:
        sizes["scale"] = np.abs(values["scale"])
    for name, size in sizes.items():
        size = np.atleast_1d(np.where(np.isfinite(size), size, np.nan))
        usual = _median(np.where(size > 0, size, np.nan))
        bad = ((size >= FAR * usual) & (size >= LARGE)) | (size >= HUGE)
        if bad.any():
            largest = np.nanmax(size)
            message = f"{name} of {bad.sum()} of {bad.size} channels is as large as {largest:.3g}"
            if bad.mean() < 0.5:
                message += f", against a median of {np.nanmedian(size[~bad]):.3g}"
            message += channels(bad)
            advice = "Lower the learning rate, clip gradients or scale the inputs; go on from an "
            advice += "earlier checkpoint"
            severity: Severity = "error" if largest >= LOST else "warning"
            yield Finding(layer.path, "exploding-channels", severity, message, advice)


def _near_zero(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "scale" not in values:
        return
    scale = np.atleast_1d(values["scale"])
    size = np.abs(scale)
    if size.size and (size.max() <= NEAR_ZERO):
        all_zero = f"all {size.size} scales are 0"
        message = all_zero if size.max() == 0 else f"no scale is above {size.max():.3g}"
        advice = (
            "Expected for a residual branch's last norm at initialization, or if 1 is added to "
        )
        advice += "the scale; otherwise the layer outputs almost nothing"
        yield Finding(layer.path, "zero-scale", "note", message, advice)
        return
    near = size <= NEAR_ZERO * _median(np.where(size > 0, size, np.nan))
    if "var" in values and values["var"].shape == scale.shape:  # dead ones have a finding already
        near &= ~dead_channels(values["var"], epsilon)
    if near.any():
        crossed = np.mean(np.real(scale) < 0) >= BOTH_SIDES
        severity: Severity = "note" if crossed or near.mean() < SHARE else "warning"
        message = f"scale of {near.sum()} of {near.size} channels is near 0, up to "
        message += f"{size[near].max():.3g} against a median of {np.nanmedian(size[~near]):.3g}"
        message += channels(near)
        advice = (
            "These channels have almost no effect: prune them, or exclude scale from weight decay"
        )
        yield Finding(layer.path, "near-zero-scale", severity, message, advice)


def _not_stored(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    present = [name for name in ("scale", "bias") if name in values]
    learned = [name for name in present if len(np.unique(values[name])) > 1]
    if learned and at_the_start(values):
        message = "mean is 0 and var is 1, as initialized, but "
        message += f"{' and '.join(learned)} {'have' if learned[1:] else 'has'} been trained"
        advice = "Keep the batch_stats that each step returns; nj.recalibrate measures them now"
        yield Finding(layer.path, "statistics-not-stored", "warning", message, advice)


def at_the_start(values: Values) -> bool:
    """Returns whether running statistics are as an init function makes them."""
    if not {"mean", "var"} <= values.keys():
        return False
    return bool(np.all(values["mean"] == 0) and np.all(values["var"] == 1))


def channels(where: np.ndarray) -> str:
    """Returns the channels' numbers, in brackets; an empty string if all are meant."""
    indices = [tuple(map(int, index)) for index in np.argwhere(where)]
    if where.ndim == 0 or where.all():
        return ""
    shown = ", ".join(str(index[0] if len(index) == 1 else index) for index in indices[:5])
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return f" (channel{'s' * (len(indices) > 1)} {shown}{more})"


def dead_channels(var: np.ndarray, epsilon: float) -> np.ndarray:
    """Returns where a variance is small, relative to epsilon or to the other variances."""
    small = var <= DEAD * epsilon
    usual = _median(np.where(small | ~np.isfinite(var), np.nan, var))
    return (var >= 0) & (small | (var <= usual / (FAR * LARGE) ** 2))


def _median(values: np.ndarray) -> np.ndarray:
    """Returns the median over the last axis, without NaN: one for each layer of a scan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for medians of nothing
        return np.nanmedian(values, -1, keepdims=True)


_RULES: tuple[Rule, ...] = (
    _not_finite,
    _infinite_variance,
    _negative_variance,
    _dead,
    _deaf,
    _exploding,
    _distant_mean,
    _near_zero,
    _not_stored,
)
