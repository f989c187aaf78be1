"""Draws what `normjax.diagnostics` measures; needs matplotlib (`pip install 'normjax[diagnostics]'`).

Each function draws on `axes`, a new figure's if None is given, and returns the figure.
"""

from normjax.diagnostics.plot.interactions import interactions
from normjax.diagnostics.plot.landscape import landscape
from normjax.diagnostics.plot.percentiles import percentiles
from normjax.diagnostics.plot.report import report
from normjax.diagnostics.plot.rotation import rotation
from normjax.diagnostics.plot.scale_invariance import scale_invariance

__all__ = ["interactions", "landscape", "percentiles", "report", "rotation", "scale_invariance"]
