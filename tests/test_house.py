"""The house stays small: no measure of `python -m tests.support.house` passes its ceiling."""

from __future__ import annotations

import pytest

from bdpo.config.judges import JUDGE_NAMES
from tests.support import house


@pytest.fixture(scope="module")
def measures():
    return {measure.name: measure for measure in house.measures()}


def test_no_measure_passes_its_ceiling(measures):
    for measure in measures.values():
        if measure.ceiling is not None:
            assert measure.found <= measure.ceiling, measure


def test_what_a_registry_finds_by_name_is_imported_by_it():
    modules = house.sources()
    found = set(house.imports("bdpo.evaluation.judges.registry", modules))
    declared = {f"bdpo.evaluation.judges.{name}" for name in JUDGE_NAMES}
    assert declared <= found
    beside = {"bdpo.evaluation.judges.base", "bdpo.evaluation.judges.known_answers"}
    assert {name for name in found if ".judges." in name and "config" not in name} == declared | beside


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"e"}, "f": {"g"}, "g": {"f", "a"}}
    assert sorted(house.circles(graph)) == [["a", "b", "c"], ["f", "g"]]
