"""What normalization does in a network of your own: its health, and the instruments of the field's findings.

Pure functions that return NamedTuples; `normjax.diagnostics.plot` draws them, with matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

from normjax.diagnostics._findings import Finding
from normjax.diagnostics.equilibrium import Compared, Equilibrium, equilibrium
from normjax.diagnostics.report import LayerReport, Range, Report, report
from normjax.diagnostics.rotation import Rotation, rotation
from normjax.diagnostics.scale_invariance import ScaleInvariance, scale_invariance

if TYPE_CHECKING:
    from normjax.diagnostics import plot as plot

__all__ = [
    "Compared",
    "Equilibrium",
    "Finding",
    "LayerReport",
    "Range",
    "Report",
    "Rotation",
    "ScaleInvariance",
    "equilibrium",
    "report",
    "rotation",
    "scale_invariance",
]


def __getattr__(name: str) -> Any:
    """Imports the plots, and matplotlib, when they are first asked for."""
    if name == "plot":
        return importlib.import_module("normjax.diagnostics.plot")
    raise AttributeError(f"module 'normjax.diagnostics' has no attribute {name!r}")
