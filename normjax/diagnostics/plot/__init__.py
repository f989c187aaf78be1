"""Draws what `normjax.diagnostics` measures; needs matplotlib (`pip install 'normjax[diagnostics]'`).

Each function draws on `axes`, a new figure's if None is given, and returns the figure.
"""

from normjax.diagnostics.plot.interactions import interactions

__all__ = ["interactions"]
