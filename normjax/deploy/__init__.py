"""Inference: batch norms folded into the layers beside them."""

from normjax.deploy.fold import Folded, Found, fold
from normjax.deploy.fold_batch_norm import fold_batch_norm

__all__ = ["Folded", "Found", "fold", "fold_batch_norm"]
