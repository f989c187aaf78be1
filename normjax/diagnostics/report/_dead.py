"""Merges the findings of layers that have the same dead channels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from normjax.diagnostics.findings import Finding
from normjax.diagnostics.report._layers import Layer
from normjax.diagnostics.report._rules import dead_channels

SHOWN = 3  # how many paths a merged finding lists


def merge_dead(
    layers: Iterable[Layer], found: Iterable[Finding], epsilon: float
) -> tuple[Finding, ...]:
    """Returns the findings, with one for all layers whose dead channels are the same.

    A depthwise convolution makes a constant channel of a constant channel, so the batch norms
    before and after it have the same dead channels.
    """
    keys = {layer.path: _key(layer, epsilon) for layer in layers}
    merged: dict[object, list[Finding]] = {}
    for finding in found:
        is_dead = finding.rule == "dead-channels" and finding.severity != "error"
        key = keys.get(finding.path) if is_dead else None
        merged.setdefault(finding if key is None else key, []).append(finding)
    return tuple(_of_all(group) for group in merged.values())


def _key(layer: Layer, epsilon: float) -> tuple[tuple[int, ...], bytes] | None:
    values = layer.values
    if "var" not in values:
        return None
    dead = dead_channels(np.atleast_1d(values["var"]), epsilon)
    return (dead.shape, dead.tobytes()) if dead.any() else None


def _of_all(group: list[Finding]) -> Finding:
    first, *others = group
    if not others:
        return first
    paths = ", ".join(finding.path for finding in others[:SHOWN])
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return first._replace(message=f"{first.message}; so do the same channels of {paths}{more}")
