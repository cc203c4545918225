"""What tests share: small real models, data files, servers, trainings, clusters."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The root of the repository, where commands are given."""
