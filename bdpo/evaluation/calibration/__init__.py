"""Calibration: judges against labels by people, and against each other, on the same answers."""
