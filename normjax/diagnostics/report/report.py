"""Reports on the health of every normalization layer of a network, as its variables show it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from normjax import _checks
from normjax.diagnostics.findings import SEVERITIES, Finding, Severity
from normjax.diagnostics.report import _gap, _text
from normjax.diagnostics.report._dead import merge_dead
from normjax.diagnostics.report._layer_report import LayerReport, Range
from normjax.diagnostics.report._layers import (
    NAMES,
    Layer,
    Leaves,
    classes_of,
    find_layers,
    leaves_of,
)
from normjax.diagnostics.report._replicas import count_replicas, diverged, replica
from normjax.diagnostics.report._rules import findings


class Report(NamedTuple):
    """The result of `report`, which `print` shows as a table, and `rich.print` in color.

    Attributes:
      layers: all normalization layers, in natural order.
      findings: errors first, then warnings, then notes.
    """

    layers: tuple[LayerReport, ...]
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        return _text.plain(self.layers, self.findings)

    def __rich__(self) -> Any:
        return _text.colored(self.layers, self.findings)

    def count(self, severity: Severity) -> int:
        """Returns the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> str:
        """Returns the report as strict JSON, without `leaves`.

        A value that is missing or not finite is null.
        """
        contents = {
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding._asdict() for finding in self.findings],
            "layers": [_json(layer) for layer in self.layers],
        }
        return json.dumps(contents, indent=2, allow_nan=False)


_RANGES = ("mean", "var", "scale")


def _json(value: Any) -> Any:
    """Returns a layer, or a part of it, in the types of JSON."""
    if isinstance(value, LayerReport | Range):
        return {name: _json(inner) for name, inner in value._asdict().items() if name != "leaves"}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(
    variables: Any,
    *,
    apply_fn: Callable[[Any, Any], Any] | None = None,
    batch: Any = None,
    measured: Any = None,
    replicated: bool | None = None,
    epsilon: float = 1e-5,
) -> Report:
    r"""Examines every normalization layer: ranges, unhealthy channels, and what to do about them.

    Layers are found by the names of their leaves, whatever their modules are called. If you pass a
    batch, or statistics that you measured, the running statistics (M, V) of each layer are compared
    with the statistics of the batch (m, v). The gap is the root mean square difference, over
    channels and inputs, between a layer's outputs in training and at inference, before scale and
    bias:

    .. math:: \text{gap}^2 = \operatorname{mean}_c \left[ \frac{(m - M)^2}{V + \epsilon} +
              v \left(\frac1{\sqrt{v + \epsilon}} - \frac1{\sqrt{V + \epsilon}}\right)^2 \right]

    These are the rules. "The median" is the median over the channels of the layer; layers of a scan
    have one each.

    - `non-finite` (error): NaN or infinity in a leaf, or in the batch's statistics.
    - `infinite-variance` (error): var is infinite, as after one batch with values beyond 1e19,
      whose squares overflow. From then on, y is the bias at inference.
    - `negative-variance` (error): var < 0.
    - `dead-channels` (note for fewer than 5% of the channels, else warning; error if all are): var
      is at most epsilon / 100, so that the output varies by a tenth of its scale, or at most 1e-6
      of the median. Layers with the same dead channels, such as those around a depthwise
      convolution, have one finding. Filter response norm: a threshold 6 deviations above the bias.
      Dynamic tanh: alpha = 0.
    - `exploding-channels` (warning; error from 1e8, where adjacent float32 numbers differ by 8):
      the input's root mean square, or the scale, is at least 100 times the median and at least 10;
      or it is at least 1e4, so that 6 deviations overflow float16.
    - `distant-mean` (error): a mean is more than 1e6 deviations from 0. There, adjacent float32
      numbers differ by a tenth of a deviation.
    - `near-zero-scale` (warning): a scale is at most 1e-3 of the median. It is a note for fewer
      than 1% of the channels, or if 10% of the scales are negative: then scales cross 0, and some
      are near 0 by chance.
    - `zero-scale` (note): no scale of the layer is above 1e-3, as in the last norm of a residual
      branch at initialization.
    - `statistics-not-stored` (warning): mean is 0 and var is 1, as initialized, but a scale or bias
      has been trained.
    - `train-eval-gap` (warning from 0.25, error from 1; a note at the start of training): the gap
      is large. A batch of n examples makes a gap of about √(1.5 / n) by chance. If 3 times that is
      more than 0.25, the warning starts there, and the error at twice as much (at 1 or more).
    - `diverged-replicas` (warning for statistics, error for parameters): copies differ by more than
      1e-6. For means this is in deviations, for other leaves relative to the largest value.

    Args:
      variables: Flax linen's variables, the pair `(params, batch_stats)`, an nnx module, or any
        tree of arrays with such leaves: a training state (its optimizer is left out), batch_stats
        alone, or a state_dict with PyTorch's names.
      apply_fn: a linen module, or `apply_fn(variables, batch)`, a forward pass in training mode, as
        in `recalibrate`. Layers of other libraries with running means, such as Flax's, are compared
        too. It is compiled, and needs `batch`.
      batch: a batch for `apply_fn`; with 100 examples or more, smaller gaps can be found.
      measured: instead of `apply_fn` and `batch`, the variables with measured statistics, as
        `recalibrate` returns them (for an nnx module, measure a copy, since `recalibrate` updates
        the module).
      replicated: whether leaves have a leading axis of devices, as with pmap. With None, their
        devices and their similarity tell. The first replica is reported. Copies that `jax.sharding`
        makes are always compared.
      epsilon: the epsilon of the layers.

    Returns:
      A `Report`. Nothing is changed.

    Raises:
      ValueError, TypeError: for variables without a normalization layer or without values (under
        jit), and for an apply_fn that is not in training mode or returns no statistics.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> batch_stats["var"] = jnp.array([1.0, 0.0, 2.0, 1.0])
      >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": batch_stats}}
      >>> for finding in nj.diagnostics.report(variables).findings:
      ...     print(f"{finding.path}: {finding.message}")
      bn: the input of 1 of 4 channels hardly varies: var up to 0 against a median of 1 (channel 1)

    References:
      Statistics of separate replicas, and gaps between training and inference: Wu & Johnson,
      "Rethinking 'Batch' in BatchNorm" (2021), sections 3 and 4. Scales that start at 0: Goyal et
      al., "Accurate, Large Minibatch SGD" (2017), section 5.1.
    """
    _check_arguments(apply_fn, batch, measured, epsilon)
    leaves, classes = leaves_of(variables), classes_of(variables)
    layers = find_layers(leaves, classes)
    if not layers:
        _raise_without_layers(variables, leaves)
    copies = count_replicas(leaves, layers, replicated)
    compared = [diverged(layer, copies, epsilon) for layer in layers]
    found = [finding for finding in compared if finding is not None]
    if copies:
        layers = [layer._replace(leaves=replica(layer.leaves)) for layer in layers]
        variables = variables if apply_fn is None else replica(variables)
    for layer in layers:
        found += findings(layer, epsilon)
    gaps: dict[str, np.ndarray] = {}
    if apply_fn is not None:
        measured = _gap.with_batch_statistics(apply_fn, variables, batch)
    if measured is not None:
        examples = math.inf if apply_fn is None else _gap.examples_in(batch)
        others = find_layers(leaves_of(measured), classes_of(measured))
        gaps, apart = _compare(layers, others, examples, epsilon)
        found += apart
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    rows = [_row(layer, gaps.get(layer.path), found) for layer in layers]
    return Report(tuple(rows), merge_dead(layers, found, epsilon))


def _compare(
    layers: list[Layer], measured: list[Layer], examples: float, epsilon: float
) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Returns the gaps of each layer's channels by path, and the findings about them."""
    gaps, found = {}, []
    batches = {layer.path: layer.values for layer in measured}
    for layer in layers:
        running, batch = layer.values, batches.get(layer.path, {})
        if "var" not in running:
            continue
        if not {"mean", "var"} <= batch.keys() or any(
            batch[name].shape != running[name].shape for name in ("mean", "var")
        ):
            shape = f"var of shape {np.shape(batch['var'])}" if "var" in batch else None
            _checks.raise_error(
                "report",
                f"measured does not fit the layer {layer.path}",
                expected=f"its mean and var of shape {running['var'].shape}",
                got=shape or f"layers {sorted(batches)}",
                fix="Pass what recalibrate returned for these variables",
            )
        gaps[layer.path] = _gap.gap_of(running, batch, epsilon)
        gap_finding = _gap.finding(layer, running, batch, gaps[layer.path], examples)
        if gap_finding is not None:
            found.append(gap_finding)
    return gaps, found


def _row(layer: Layer, gaps: np.ndarray | None, found: list[Finding]) -> LayerReport:
    values = layer.values
    mean, var, scale = (_range(values[name]) if name in values else None for name in _RANGES)
    own: list[Severity] = [finding.severity for finding in found if finding.path == layer.path]
    worst = own[0] if own else None
    shape = next((values[name].shape for name in (*_RANGES, "bias") if name in values), ())
    gap = None if gaps is None else _gap.rms(gaps)
    return LayerReport(layer.path, layer.kind, shape, mean, var, scale, gap, worst, values)


def _range(values: np.ndarray) -> Range:
    values = np.abs(values) if np.iscomplexobj(values) else values
    values = values[np.isfinite(values)]
    if not values.size:
        return Range(math.nan, math.nan, math.nan)
    low, median, high = np.quantile(values, (0, 0.5, 1))
    return Range(float(low), float(median), float(high))


def _check_arguments(apply_fn: Any, batch: Any, measured: Any, epsilon: float) -> None:
    _checks.number("report", "epsilon", epsilon, 0.0, math.inf)
    if (apply_fn is None) != (batch is None) or (apply_fn is not None and measured is not None):
        given = {"apply_fn": apply_fn, "batch": batch, "measured": measured}
        _checks.raise_error(
            "report",
            "the statistics of a batch are given in part, or twice",
            expected="apply_fn and batch together, or only measured, or none of them",
            got=" and ".join(name for name, value in given.items() if value is not None),
            fix="Pass report(variables, apply_fn=apply_fn, batch=batch)",
        )
    if apply_fn is not None:
        _checks.must_be_callable(
            "report",
            "apply_fn",
            apply_fn,
            expected="a function of variables and batch",
            fix="Pass report(variables, apply_fn=apply_fn, batch=batch)",
        )


def _raise_without_layers(variables: Any, leaves: Leaves) -> None:
    names = ["/".join(path) for path in leaves]
    listed = f": {', '.join(names[:4])}{', ...' * (len(names) > 4)}" if any(names) else ""
    _checks.raise_error(
        "report",
        "there is no normalization layer",
        expected=f"leaves with these names: {NAMES}",
        got=f"{type(variables).__name__} with {len(names)} arrays{listed}",
        fix="Pass the variables of a model that normalizes: {'params': ..., 'batch_stats': ...}",
    )
