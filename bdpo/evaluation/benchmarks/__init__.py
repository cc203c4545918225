"""Benchmarks: the prompts, and what is measured on the answers."""
