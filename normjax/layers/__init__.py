"""Normalization layers, one file each, with their `init` functions."""
