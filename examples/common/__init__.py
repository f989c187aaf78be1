"""What the examples share: data, networks, training and reports."""
