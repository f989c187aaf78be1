"""Draws what `normjax.diagnostics` measures, with matplotlib: `pip install 'normjax[diagnostics]'`.

Each function draws on `axes`, or on a new figure if they are None, and returns the figure.
"""

from normjax import _extras

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    _extras.raise_for_missing("normjax.diagnostics.plot", "plots are drawn with", error)

from normjax.diagnostics.plot.interactions import interactions  # noqa: E402
from normjax.diagnostics.plot.landscape import landscape  # noqa: E402
from normjax.diagnostics.plot.percentiles import percentiles  # noqa: E402
from normjax.diagnostics.plot.report import report  # noqa: E402
from normjax.diagnostics.plot.rotation import rotation  # noqa: E402
from normjax.diagnostics.plot.scale_invariance import scale_invariance  # noqa: E402

__all__ = ["interactions", "landscape", "percentiles", "report", "rotation", "scale_invariance"]
