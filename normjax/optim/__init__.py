"""Optax transformations for networks with normalization, and masks for them.

They distinguish kernels from other parameters, and use the scale invariance of kernels.
"""

from normjax.optim.accumulate import accumulate
from normjax.optim.effective import effective_learning_rate, rotational_equilibrium
from normjax.optim.invariance import scale_invariant
from normjax.optim.kinds import decay_mask, kind_of
from normjax.optim.project import project_scale_invariant
from normjax.optim.renormalize import renormalize

__all__ = [
    "accumulate",
    "decay_mask",
    "effective_learning_rate",
    "kind_of",
    "project_scale_invariant",
    "renormalize",
    "rotational_equilibrium",
    "scale_invariant",
]
