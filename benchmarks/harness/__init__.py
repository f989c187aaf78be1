"""Code that the benchmarks share: cases, peers, timing and records."""
