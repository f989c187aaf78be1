"""The numbers of a layer in a report."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from normjax.diagnostics.findings import Severity


class Range(NamedTuple):
    """The smallest, median and largest finite value of a leaf; magnitudes of complex ones."""

    low: float
    median: float
    high: float


class LayerReport(NamedTuple):
    """A normalization layer in numbers.

    Attributes:
      path: its path, joined by slashes, without the names of collections; `"/"` if the variables
        are a single layer.
      kind: the kind of layer, from its leaves and names: `"batch norm"`, or `"norm"` if they do not
        say more.
      shape: the shape of its features.
      mean: the range of the running means; None for a layer without.
      var: the range of the running variances; None for a layer without.
      scale: the range of the scales; None for a layer without.
      gap: the gap between training and inference, in standard deviations of the output; None
        without statistics of a batch.
      severity: the severity of its worst finding; None without findings.
      leaves: all its leaves, in float64.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    mean: Range | None
    var: Range | None
    scale: Range | None
    gap: float | None
    severity: Severity | None
    leaves: dict[str, np.ndarray]
