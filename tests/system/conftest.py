"""Every test of this folder carries the marker `system`, which `make test` leaves out."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of all items that were collected, those whose file lies here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("system")
            item.add_marker(pytest.mark.timeout(3600))  # whole pipelines, maybe beside other work
