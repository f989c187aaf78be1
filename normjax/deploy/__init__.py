"""Inference: whole models whose batch norms are folded into the layers before them.

`normjax.fold_batch_norm` does it for one layer.
"""

from normjax.deploy.fold_model import Folded, Found, fold

__all__ = ["Folded", "Found", "fold"]
