"""Judges: a verdict on one answer to one request."""
