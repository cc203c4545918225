"""Attacks on the run's own model: how much safety is left when somebody tries."""
