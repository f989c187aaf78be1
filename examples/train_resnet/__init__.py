"""Trains ResNets with synced batch normalization, from one laptop to a TPU pod; see README.md."""
