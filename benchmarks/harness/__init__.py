"""What the benchmarks share: rows to run, peers to run them with, a clock, and records."""
