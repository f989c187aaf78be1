"""Shows what normalization does in your network: its health, and the measurements of papers.

`lint` and `report` are for every user, the functions of `instruments` for those who study networks.
All are pure functions that return tuples with named fields, which `plot` draws.
"""

import importlib
from typing import TYPE_CHECKING, Any

from normjax.diagnostics.findings import Finding
from normjax.diagnostics.instruments import (
    BatchVariance,
    Compared,
    CovariateShift,
    Eigenvalue,
    Equilibrium,
    Interactions,
    Landscape,
    Leakage,
    Percentiles,
    Rotation,
    ScaleInvariance,
    batch_variance,
    equilibrium,
    hessian_eigenvalue,
    interactions,
    internal_covariate_shift,
    landscape,
    layer_inputs,
    leakage,
    percentiles,
    rotation,
    scale_invariance,
)

# `lint` and `report` are packages, too. Python binds a package's name here when it is first
# imported, and the function replaces it; with an import on first use, a later one would undo that.
from normjax.diagnostics.lint import Lint, lint
from normjax.diagnostics.report import LayerReport, Range, Report, report

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
