"""How `lint` reads a network: its jaxpr as one graph, the normalizations in it, and the rules."""
