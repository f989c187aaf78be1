"""What a report says of a layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from normjax.diagnostics._findings import Severity


class Range(NamedTuple):
    """What a leaf holds: its smallest, median and largest finite value; magnitudes of complex ones."""

    low: float
    median: float
    high: float


class LayerReport(NamedTuple):
    """A normalization layer in numbers.

    Attributes:
      path: its parts joined by slashes, without the names of collections; `"/"` where there is
        nothing but one layer.
      kind: what it is, by its leaves and names: `"batch norm"`, or `"norm"` where names do not tell
        layers apart.
      shape: of its features.
      mean: of the running means; None for a layer without.
      var: of the running variances; None for a layer without.
      scale: None for a layer without.
      gap: between training and inference, in standard deviations of the output; None where no batch
        tells.
      severity: of its worst finding; None where there is none.
      leaves: all that it holds, float64.
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
