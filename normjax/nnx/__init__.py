"""Doors for `flax.nnx`: Flax's arguments, names and variables; normjax's arithmetic."""

from normjax.nnx.batch_norm import BatchNorm

__all__ = ["BatchNorm"]
