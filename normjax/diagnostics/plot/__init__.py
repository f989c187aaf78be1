"""Draws what `normjax.diagnostics` measures, with matplotlib: `pip install 'normjax[diagnostics]'`.

Each function draws on `axes`, or on a new figure if they are None, and returns the figure.
"""

from normjax import _extras

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    _extras.raise_for_missing("normjax.diagnostics.plot", "plots are drawn with", error)

from normjax.diagnostics.plot.interactions import interactions
from normjax.diagnostics.plot.landscape import landscape
from normjax.diagnostics.plot.percentiles import percentiles
from normjax.diagnostics.plot.report import report
from normjax.diagnostics.plot.rotation import rotation
from normjax.diagnostics.plot.scale_invariance import scale_invariance

__all__ = ["interactions", "landscape", "percentiles", "report", "rotation", "scale_invariance"]
