"""Safety evaluation: benchmarks, judges, generation engines, measures and comparisons."""
