"""The health of every normalization layer of a network, from its variables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from normjax import _checks
from normjax.diagnostics import _gap, _text
from normjax.diagnostics._findings import SEVERITIES, Finding, Severity
from normjax.diagnostics._layers import Layer, Leaves, classes_of, find_layers, leaves_of
from normjax.diagnostics._replicas import count_replicas, diverged, replica
from normjax.diagnostics._reported import LayerReport, Range
from normjax.diagnostics._rules import findings


class Report(NamedTuple):
    """What `report` found. It prints as a table, and in color with `rich.print`.

    Attributes:
      layers: all of them, in natural order.
      findings: errors first, then warnings, then notes.
    """

    layers: tuple[LayerReport, ...]
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        return _text.plain(self.layers, self.findings)

    def __rich__(self) -> Any:
        return _text.colored(self.layers, self.findings)

    def count(self, severity: Severity) -> int:
        """Returns how many findings there are of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> str:
        """Returns the report as strict JSON, with null for what is not there or not finite; without `leaves`."""
        contents = {
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding._asdict() for finding in self.findings],
            "layers": [_json(layer) for layer in self.layers],
        }
        return json.dumps(contents, indent=2, allow_nan=False)


_RANGES = ("mean", "var", "scale")


def _json(value: Any) -> Any:
    """A layer, or a part of it, as JSON has it."""
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
    r"""Examines every normalization layer: ranges, sick channels, and what to do about each.

    Layers are found by the names of their leaves, whatever modules are called. With a batch, or
    statistics measured beforehand, running statistics (M, V) are compared with its own (m, v) layer
    by layer. The gap is the root mean square, over channels and inputs, between what a layer puts
    out in training and at inference, scale and bias apart:

    .. math:: \text{gap}^2 = \operatorname{mean}_c \left[ \frac{(m - M)^2}{V + \epsilon} +
              v \left(\frac1{\sqrt{v + \epsilon}} - \frac1{\sqrt{V + \epsilon}}\right)^2 \right]

    What is looked for (thresholds are relative to the median of the layer's channels, and of each
    layer of a stack):

    - `non-finite` (error): NaN or infinity in a leaf, or in the batch's statistics.
    - `negative-variance` (error): var < 0.
    - `dead-channels` (warning; error if all are): var is at most epsilon / 100, so that the output
      varies by a tenth of its scale, or at most 1e-6 of the median. Filter response norm: a
      threshold 6 deviations above the bias. Dynamic
      tanh: alpha = 0.
    - `exploding-channels` (warning; error from 1e8, where float32 goes in steps of 8): the input's
      root mean square, or scale, is 100 times the median and at least 10, or at least 1e4, 6
      deviations of which are where float16 ends.
    - `near-zero-scale` (warning): a scale is at most 1e-3 of the median. A note where that is below
      1% of the channels, or 10% of the scales are negative: having spread from 0, some are on their
      way through it.
    - `zero-scale` (note): no scale of the layer is above 1e-3, as the last of a residual branch
      starts.
    - `statistics-not-stored` (warning): mean 0 and var 1 as at the start, beside a scale or bias
      that has learned.
    - `train-eval-gap` (warning from 0.25, error from 1; a note at the start of training): the gap.
      Of a batch of n examples a warning from 3 √(1.5 / n), 3 times what chance makes of it, and an
      error from twice that.
    - `diverged-replicas` (warning for statistics, error for parameters): copies that differ by more
      than 1e-6, means in deviations and the rest in parts of the largest value.

    Args:
      variables: Flax linen's, the pair `(params, batch_stats)`, an nnx module, or any tree of
        arrays with such leaves: a state of training (its optimizer is left out), batch_stats alone,
          a state_dict with PyTorch's names.
      apply_fn: `apply_fn(variables, batch)`, a forward pass in training mode, as in `recalibrate`;
        also of layers of other libraries that keep running means, such as Flax's. It is compiled.
        Needs `batch`.
      batch: as `apply_fn` takes it; 100 examples or more say most.
      measured: instead of both, variables whose statistics were measured, such as those of
        `recalibrate` (of a copy of an nnx module, which it updates).
      replicated: whether leaves have a leading axis of devices, as pmap keeps them; None to see for
        itself, by where they lie and by how much alike they are. The first replica is reported on.
        Copies that `jax.sharding` makes are compared without that.
      epsilon: of the layers.

    Returns:
      A `Report`. Nothing is changed.

    Raises:
      ValueError, TypeError: for variables without a normalization layer, or without values (under
        jit); an apply_fn that does not train, or returns no statistics.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> batch_stats["var"] = jnp.array([1.0, 0.0, 2.0, 1.0])
      >>> for finding in nj.diagnostics.report({"params": {"bn": params}, "batch_stats": {"bn": batch_stats}}).findings:
      ...     print(f"{finding.path}: {finding.message}")
      bn: the input of 1 of 4 channels hardly varies: var up to 0 against a median of 1 (channel 1)

    References:
      Statistics that replicas keep apart, and gaps between training and inference: Wu & Johnson,
      "Rethinking 'Batch' in BatchNorm" (2021), sections 3 and 4. Scales that start at 0: Goyal et
      al., "Accurate, Large Minibatch SGD" (2017), section 5.1.
    """
    _check_arguments(apply_fn, batch, measured, epsilon)
    leaves, classes = leaves_of(variables), classes_of(variables)
    layers = find_layers(leaves, classes)
    if not layers:
        _refuse_none(variables, leaves)
    copies = count_replicas(leaves, layers, replicated)
    found = [apart for layer in layers if (apart := diverged(layer, copies, epsilon))]
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
        gaps, apart = _compared(
            layers, find_layers(leaves_of(measured), classes_of(measured)), examples, epsilon
        )
        found += apart
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(tuple(_row(layer, gaps.get(layer.path), found) for layer in layers), tuple(found))


def _compared(
    layers: list[Layer], measured: list[Layer], examples: float, epsilon: float
) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """Returns the gaps by path, and what there is to say about them."""
    gaps, found = {}, []
    batches = {layer.path: layer.values for layer in measured}
    for layer in layers:
        running, batch = layer.values, batches.get(layer.path, {})
        if "var" not in running:
            continue
        if any(
            name not in batch or batch[name].shape != running[name].shape
            for name in ("mean", "var")
        ):
            _checks.raise_error(
                "report",
                f"measured does not fit the layer {layer.path}",
                expected=f"its mean and var of shape {running['var'].shape}",
                got=f"var of shape {np.shape(batch['var'])}"
                if "var" in batch
                else f"layers {sorted(batches)}",
                fix="Pass what recalibrate returned for these variables",
            )
        gaps[layer.path] = _gap.gap_of(running, batch, epsilon)
        found += (
            [apart]
            if (apart := _gap.finding(layer, running, batch, gaps[layer.path], examples))
            else []
        )
    return gaps, found


def _row(layer: Layer, gaps: np.ndarray | None, found: list[Finding]) -> LayerReport:
    values = layer.values
    mean, var, scale = (_range(values[name]) if name in values else None for name in _RANGES)
    worst: Severity | None = next(
        (finding.severity for finding in found if finding.path == layer.path), None
    )
    shape = next((values[name].shape for name in (*_RANGES, "bias") if name in values), ())
    gap = None if gaps is None else _gap.rms(gaps)
    return LayerReport(layer.path, layer.kind, shape, mean, var, scale, gap, worst, values)


def _range(values: np.ndarray) -> Range:
    values = np.abs(values) if np.iscomplexobj(values) else values
    values = values[np.isfinite(values)]
    return (
        Range(*map(float, np.quantile(values, (0, 0.5, 1))))
        if values.size
        else Range(*[math.nan] * 3)
    )


def _check_arguments(apply_fn: Any, batch: Any, measured: Any, epsilon: float) -> None:
    _checks.between("report", "epsilon", epsilon, 0.0, math.inf)
    if (apply_fn is None) != (batch is None) or (apply_fn is not None and measured is not None):
        given = {"apply_fn": apply_fn, "batch": batch, "measured": measured}
        _checks.raise_error(
            "report",
            "there is not one way to know a batch's statistics",
            expected="apply_fn and batch together, or measured alone, or none of them",
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


def _refuse_none(variables: Any, leaves: Leaves) -> None:
    names = ["/".join(path) for path in leaves]
    listed = f": {', '.join(names[:4])}{', ...' * (len(names) > 4)}" if any(names) else ""
    _checks.raise_error(
        "report",
        "there is no normalization layer",
        expected="leaves such as 'mean' beside 'var', or 'scale'",
        got=f"{type(variables).__name__} with {len(names)} arrays{listed}",
        fix="Pass the variables of a model that normalizes: {'params': ..., 'batch_stats': ...}",
    )
