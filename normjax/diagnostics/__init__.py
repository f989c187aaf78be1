"""Shows what normalization does in your network: its health, and the measurements of papers.

All are pure functions that return NamedTuples; `normjax.diagnostics.plot` draws these.
"""

import importlib
from typing import TYPE_CHECKING, Any

from normjax.diagnostics._findings import Finding
from normjax.diagnostics._reported import LayerReport, Range
from normjax.diagnostics.batch_variance import BatchVariance, batch_variance
from normjax.diagnostics.covariate_shift import CovariateShift, internal_covariate_shift
from normjax.diagnostics.equilibrium import Compared, Equilibrium, equilibrium
from normjax.diagnostics.hessian import Eigenvalue, hessian_eigenvalue
from normjax.diagnostics.inputs import layer_inputs
from normjax.diagnostics.interactions import Interactions, interactions
from normjax.diagnostics.landscape import Landscape, landscape
from normjax.diagnostics.leakage import Leakage, leakage
from normjax.diagnostics.lint import Lint, lint
from normjax.diagnostics.percentiles import Percentiles, percentiles
from normjax.diagnostics.report import Report, report
from normjax.diagnostics.rotation import Rotation, rotation
from normjax.diagnostics.scale_invariance import ScaleInvariance, scale_invariance

if TYPE_CHECKING:
    from normjax.diagnostics import plot as plot

__all__ = [
    "BatchVariance",
    "Compared",
    "CovariateShift",
    "Eigenvalue",
    "Equilibrium",
    "Finding",
    "Interactions",
    "Landscape",
    "LayerReport",
    "Leakage",
    "Lint",
    "Percentiles",
    "Range",
    "Report",
    "Rotation",
    "ScaleInvariance",
    "batch_variance",
    "equilibrium",
    "hessian_eigenvalue",
    "interactions",
    "internal_covariate_shift",
    "landscape",
    "layer_inputs",
    "leakage",
    "lint",
    "percentiles",
    "report",
    "rotation",
    "scale_invariance",
]


def __getattr__(name: str) -> Any:
    """Imports the plots, and matplotlib, when they are first asked for."""
    if name == "plot":
        return importlib.import_module("normjax.diagnostics.plot")
    raise AttributeError(f"module 'normjax.diagnostics' has no attribute {name!r}")
