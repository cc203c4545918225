"""Experiments: arms that differ in one thing, and what their results show."""
