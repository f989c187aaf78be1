"""Finds mistakes around normalization in a network, before it is trained.

The network is traced into a graph of values (`_trace`, `_graph`). `_norms` finds the normalizations
in it, and `_rules`, `_biases`, `_decay` and `_layout` have the rules about them.
"""

from normjax.diagnostics.lint.lint import Lint, lint

__all__ = ["Lint", "lint"]
