"""Draws what `normjax.diagnostics` measures; needs matplotlib (`pip install 'normjax[diagnostics]'`).

Each function draws on `axes`, a new figure's if None is given, and returns the figure.
"""

from normjax.diagnostics.plot.landscape import landscape
from normjax.diagnostics.plot.percentiles import percentiles

__all__ = ["landscape", "percentiles"]
