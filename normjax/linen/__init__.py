"""Doors for `flax.linen`: Flax's arguments, names and variables; normjax's arithmetic."""

from normjax.linen.batch_norm import BatchNorm

__all__ = ["BatchNorm"]
