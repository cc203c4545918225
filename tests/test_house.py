"""The house stays small: no measure of `python -m tests.support.house` passes its ceiling."""

from __future__ import annotations

import pytest

from tests.support import house

# To tighten, as the rooms are cleared: what is still above its ceiling, and how much it may be until then.
STILL = {
    "functions that return dict[str, Any]": 34,
}


@pytest.fixture(scope="module")
def measures():
    return {measure.name: measure for measure in house.measures()}


def test_no_measure_passes_its_ceiling(measures):
    for measure in measures.values():
        if measure.ceiling is not None:
            assert measure.found <= STILL.get(measure.name, measure.ceiling), measure


def test_what_has_reached_its_ceiling_is_no_longer_excused(measures):
    assert all(measures[name].found > measures[name].ceiling for name in STILL)


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"e"}, "f": {"g"}, "g": {"f", "a"}}
    assert sorted(house.circles(graph)) == [["a", "b", "c"], ["f", "g"]]
