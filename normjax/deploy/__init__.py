"""Folds the batch norms of whole models into neighbouring layers, for inference.

`normjax.fold_batch_norm` folds a single layer.
"""

from normjax.deploy.fold_model import Folded, Found, fold

__all__ = ["Folded", "Found", "fold"]
