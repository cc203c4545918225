"""The house stays small: no measure of `python -m tests.support.house` passes its ceiling."""

from __future__ import annotations

import pytest

from tests.support import house


@pytest.fixture(scope="module")
def measures():
    return {measure.name: measure for measure in house.measures()}


def test_no_measure_passes_its_ceiling(measures):
    for measure in measures.values():
        if measure.ceiling is not None:
            assert measure.found <= measure.ceiling, measure


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"e"}, "f": {"g"}, "g": {"f", "a"}}
    assert sorted(house.circles(graph)) == [["a", "b", "c"], ["f", "g"]]
