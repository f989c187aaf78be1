"""Reads a network for `lint`: its jaxpr as one graph, the normalizations in it, and the rules."""
