"""What a report says about a single layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from normjax.diagnostics.findings import Severity


class Range(NamedTuple):
    """The smallest, median and largest finite value of a leaf; for complex values, magnitudes."""

    low: float
    median: float
    high: float


class LayerReport(NamedTuple):
    """A normalization layer in numbers.

    Attributes:
      path: its path, joined by slashes, without the names of collections; `"/"` if the variables
        are a single layer.
      kind: the kind of layer, as its leaves and names tell it, such as `"batch norm"`; `"norm"` if
        they do not tell more.
      shape: the shape of its features.
      mean: the range of its running means; None for a layer without running means.
      var: the range of its running variances; None for a layer without running variances.
      scale: the range of its scales; None for a layer without scales.
      gap: the gap between training and inference, in standard deviations of the output; None if
        `report` had no batch statistics to compare with.
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
