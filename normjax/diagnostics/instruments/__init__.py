"""Measures what papers about normalization measure, for those who study networks."""

from normjax.diagnostics.instruments.batch_variance import BatchVariance, batch_variance
from normjax.diagnostics.instruments.covariate_shift import CovariateShift, internal_covariate_shift
from normjax.diagnostics.instruments.equilibrium import Compared, Equilibrium, equilibrium
from normjax.diagnostics.instruments.hessian import Eigenvalue, hessian_eigenvalue
from normjax.diagnostics.instruments.inputs import layer_inputs
from normjax.diagnostics.instruments.interactions import Interactions, interactions
from normjax.diagnostics.instruments.landscape import Landscape, landscape
from normjax.diagnostics.instruments.leakage import Leakage, leakage
from normjax.diagnostics.instruments.percentiles import Percentiles, percentiles
from normjax.diagnostics.instruments.rotation import Rotation, rotation
from normjax.diagnostics.instruments.scale_invariance import ScaleInvariance, scale_invariance

__all__ = [
    "BatchVariance",
    "Compared",
    "CovariateShift",
    "Eigenvalue",
    "Equilibrium",
    "Interactions",
    "Landscape",
    "Leakage",
    "Percentiles",
    "Rotation",
    "ScaleInvariance",
    "batch_variance",
    "equilibrium",
    "hessian_eigenvalue",
    "internal_covariate_shift",
    "interactions",
    "landscape",
    "layer_inputs",
    "leakage",
    "percentiles",
    "rotation",
    "scale_invariance",
]
