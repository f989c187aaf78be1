"""Reports on the health of every normalization layer of a trained network.

`page` writes a report as HTML, and `checkpoints` reads the files that `python -m
normjax.diagnostics` is given.
"""

from normjax.diagnostics.report._layer_report import LayerReport, Range
from normjax.diagnostics.report.report import Report, report

__all__ = ["LayerReport", "Range", "Report", "report"]
