"""The rules of `report` about the parameters and running statistics of a single layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np

from normjax.diagnostics.findings import Finding, Severity
from normjax.diagnostics.report._layers import Layer, Values

# A var of DEAD * epsilon makes the output vary by a tenth of the scale.
DEAD = 1e-2
# In multiples of the layer's median. Channels of healthy layers are within a factor of about 10.
FAR = 1e2
# Nothing below LARGE is reported as exploding; 6 deviations of HUGE overflow float16.
LARGE, HUGE = 1e1, 1e4
# At LOST, adjacent float32 numbers differ by 8, so sums lose smaller terms.
LOST = 1e8
# In deviations. At DISTANT, adjacent float32 numbers differ by a tenth of a deviation.
DISTANT = 1e6
# In multiples of the layer's median. Such a channel has almost no effect on the next layer.
NEAR_ZERO = 1e-3
# If a smaller share of the channels has a scale near 0, they can be pruned; it is not a problem.
SHARE = 1e-2
# If a smaller share of the channels is dead, it is not a problem either: an EfficientNet-lite0 that
# was trained on ImageNet has dead channels in 28 of its 49 layers, in 26 of them at most 1.4%.
DEAD_SHARE = 5e-2
# If this share of the scales is negative, scales are crossing 0, and some are near 0 by chance.
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
        bad["var"] &= values["var"] != np.inf  # infinite variances have a rule of their own
    bad = {name: where for name, where in bad.items() if where.any()}
    if bad:
        counts = [
            f"{where.sum()} of {where.size} in {name}{channels(where)}"
            for name, where in bad.items()
        ]
        yield Finding(
            layer.path,
            "non-finite",
            "error",
            f"NaN or infinite: {', '.join(counts)}",
            "Go back to an earlier checkpoint; jax.config.update('jax_debug_nans', True) shows "
            "where NaN starts",
        )


def _infinite_variance(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" in values and (bad := values["var"] == np.inf).any():
        yield Finding(
            layer.path,
            "infinite-variance",
            "error",
            f"{bad.sum()} of {bad.size} variances are infinite{channels(bad)}: the network "
            "diverged; at inference their output is the bias, whatever the input is",
            "Go back to an earlier checkpoint, since a running variance stays infinite; look for "
            "inputs beyond 1e19, whose squares float32 cannot hold",
        )


def _distant_mean(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if not {"mean", "var"} <= values.keys() or values["mean"].shape != values["var"].shape:
        return
    var = np.atleast_1d(values["var"])
    usable = np.isfinite(var) & (var >= 0) & ~dead_channels(var, epsilon)
    deviation = np.sqrt(np.where(usable, var, 1) + epsilon)
    distance = np.where(usable, np.abs(np.atleast_1d(values["mean"])) / deviation, 0)
    bad = (distance > DISTANT) & np.isfinite(distance)
    if bad.any():
        yield Finding(
            layer.path,
            "distant-mean",
            "error",
            f"{bad.sum()} of {bad.size} means lie up to {distance[bad].max():.3g} deviations "
            f"from 0{channels(bad)}: float32 rounds away most of how their inputs differ",
            "Look for what adds so large a constant before the layer: the network diverged, or "
            "its inputs are not centered",
        )


def _negative_variance(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" in values and (bad := values["var"] < 0).any():
        least = values["var"][bad].min()
        yield Finding(
            layer.path,
            "negative-variance",
            "error",
            f"{bad.sum()} of {bad.size} variances are negative, down to {least:.3g}{channels(bad)}",
            "Measure them with nj.recalibrate; merge variances with nj.merge_moments, never by "
            "subtraction",
        )


def _dead(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "var" not in values:
        return
    var = np.atleast_1d(values["var"])
    dead = dead_channels(var, epsilon)
    if dead.any():
        against = "" if dead.all() else f" against a median of {np.nanmedian(var[~dead]):.3g}"
        yield Finding(
            layer.path,
            "dead-channels",
            _severity(dead),
            f"the input of {dead.sum()} of {dead.size} channels hardly varies: var up to "
            f"{var[dead].max():.3g}{against}{channels(dead)}",
            "Look for dead ReLUs, kernels that decayed to 0 or constant inputs before them; "
            "reinitialize or prune them",
        )


def _severity(dead: np.ndarray) -> Severity:
    """Returns the severity of dead channels, by their share of all channels."""
    few: Severity = "note" if dead.mean() < DEAD_SHARE else "warning"
    return "error" if dead.all() else few


def _constant_output(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    """Yields channels whose output is constant because of the layer's own parameters."""
    advice = (
        "Reinitialize these parameters; train them with a lower learning rate and without weight "
        "decay"
    )
    if layer.kind == "dynamic tanh" and np.any(values.get("alpha", np.ones(1)) == 0):
        message = "alpha is 0: the output is the bias, whatever x is"
        yield Finding(layer.path, "dead-channels", "error", message, advice)
    if "threshold" in values:
        scale, bias = values.get("scale", np.ones(1)), values.get("bias", np.zeros(1))
        # The normalized x has a mean square of 1, so at most 1 in 36 values is beyond 6. There is
        # another rule for scales near 0.
        dead = np.atleast_1d(values["threshold"] > bias + 6 * np.maximum(np.abs(scale), 0.1))
        if dead.any():
            exceed = f"{dead.sum()} of {dead.size} channels hardly ever exceed their threshold"
            message = f"{exceed}{channels(dead)}"
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
        yield from _exploding_sizes(layer, name, size)


def _exploding_sizes(layer: Layer, name: str, size: np.ndarray) -> Iterator[Finding]:
    """Yields the finding about channels whose size is far above the others'.

    Args:
      layer: the layer.
      name: what the sizes are of.
      size: the sizes by channel; NaN for channels to leave out.
    """
    size = np.atleast_1d(np.where(np.isfinite(size), size, np.nan))
    usual = _median(np.where(size > 0, size, np.nan))
    bad = ((size >= FAR * usual) & (size >= LARGE)) | (size >= HUGE)
    if bad.any():
        largest = np.nanmax(size)
        few = bad.mean() < 0.5
        against = f", against a median of {np.nanmedian(size[~bad]):.3g}" if few else ""
        yield Finding(
            layer.path,
            "exploding-channels",
            "error" if largest >= LOST else "warning",
            f"{name} of {bad.sum()} of {bad.size} channels is as large as {largest:.3g}"
            f"{against}{channels(bad)}",
            "Lower the learning rate, clip gradients or scale the inputs; go on from an earlier "
            "checkpoint",
        )


def _near_zero(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    if "scale" not in values:
        return
    scale = np.atleast_1d(values["scale"])
    size = np.abs(scale)
    if size.size and size.max() <= NEAR_ZERO:
        yield _all_near_zero(layer, size)
        return
    near = size <= NEAR_ZERO * _median(np.where(size > 0, size, np.nan))
    # Dead channels have a finding already.
    if "var" in values and values["var"].shape == scale.shape:
        near &= ~dead_channels(values["var"], epsilon)
    if near.any():
        crossed = np.mean(np.real(scale) < 0) >= BOTH_SIDES
        yield Finding(
            layer.path,
            "near-zero-scale",
            "note" if crossed or near.mean() < SHARE else "warning",
            f"scale of {near.sum()} of {near.size} channels is near 0, up to "
            f"{size[near].max():.3g} against a median of {np.nanmedian(size[~near]):.3g}"
            f"{channels(near)}",
            "These channels have almost no effect: prune them, or exclude scale from weight decay",
        )


def _all_near_zero(layer: Layer, size: np.ndarray) -> Finding:
    all_zero = f"all {size.size} scales are 0"
    return Finding(
        layer.path,
        "zero-scale",
        "note",
        all_zero if size.max() == 0 else f"no scale is above {size.max():.3g}",
        "Expected for a residual branch's last norm at initialization, or if 1 is added to the "
        "scale; otherwise the layer outputs almost nothing",
    )


def _not_stored(layer: Layer, values: Values, epsilon: float) -> Iterator[Finding]:
    present = [name for name in ("scale", "bias") if name in values]
    learned = [name for name in present if len(np.unique(values[name])) > 1]
    if learned and at_the_start(values):
        trained = f"{' and '.join(learned)} {'have' if learned[1:] else 'has'} been trained"
        yield Finding(
            layer.path,
            "statistics-not-stored",
            "warning",
            f"mean is 0 and var is 1, as initialized, but {trained}",
            "Keep the batch_stats that each step returns; nj.recalibrate measures them now",
        )


def at_the_start(values: Values) -> bool:
    """Returns whether running statistics have the values of initialization."""
    if not {"mean", "var"} <= values.keys():
        return False
    return bool(np.all(values["mean"] == 0) and np.all(values["var"] == 1))


def channels(where: np.ndarray) -> str:
    """Returns the numbers of the channels in parentheses; an empty string for all channels."""
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
    """Returns the median over the last axis without NaN; layers of a scan have one each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the median of nothing is NaN
        return np.nanmedian(values, -1, keepdims=True)


_RULES: tuple[Rule, ...] = (
    _not_finite,
    _infinite_variance,
    _negative_variance,
    _dead,
    _constant_output,
    _exploding,
    _distant_mean,
    _near_zero,
    _not_stored,
)
