"""One file a layer: its init, its function, its mathematics in the docstring."""
