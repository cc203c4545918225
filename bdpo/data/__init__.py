"""Preference data: sources, formats, and the prepared pairs."""
