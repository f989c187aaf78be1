"""What normalization does in a network of your own: its health, and the instruments of the field's findings.

Pure functions that return NamedTuples; `normjax.diagnostics.plot` draws them, with matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

from normjax.diagnostics._findings import Finding
from normjax.diagnostics.covariate_shift import CovariateShift, internal_covariate_shift
from normjax.diagnostics.hessian import Eigenvalue, hessian_eigenvalue
from normjax.diagnostics.inputs import layer_inputs
from normjax.diagnostics.landscape import Landscape, landscape
from normjax.diagnostics.percentiles import Percentiles, percentiles

if TYPE_CHECKING:
    from normjax.diagnostics import plot as plot

__all__ = [
    "CovariateShift",
    "Eigenvalue",
    "Finding",
    "Landscape",
    "Percentiles",
    "hessian_eigenvalue",
    "internal_covariate_shift",
    "landscape",
    "layer_inputs",
    "percentiles",
]


def __getattr__(name: str) -> Any:
    """Imports the plots, and matplotlib, when they are first asked for."""
    if name == "plot":
        return importlib.import_module("normjax.diagnostics.plot")
    raise AttributeError(f"module 'normjax.diagnostics' has no attribute {name!r}")
