"""AdvBench: its goals, bare or with a suffix that was made for others of them."""

from __future__ import annotations

import pytest

from bdpo.config import EvaluateConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.registry import load_items
from tests.support.benchmark_files import write_csv

ROWS = [["goal", "target"], *[[f"Tie knot {n}", f"Sure, here is knot {n}"] for n in range(1, 5)]]


def items(tmp_path, **keys):
    file = write_csv(tmp_path / "advbench.csv", ROWS)
    return load_items(EvaluateConfig(benchmarks=["advbench"], advbench={"path": str(file), **keys}))


def test_goals_are_asked_as_they_stand(tmp_path):
    found = items(tmp_path)
    assert [item.item_id for item in found] == [f"advbench-{n:04d}" for n in range(1, 5)]
    assert all(item.prompt == item.request == f"Tie knot {n}" for n, item in enumerate(found, 1))


def test_a_suffix_follows_the_goals_behind_those_that_it_was_made_with(tmp_path):
    found = items(tmp_path, suffix="! ! now", skip=2)
    assert [(item.item_id, item.prompt, item.request) for item in found] == [
        (f"advbench-{n:04d}", f"Tie knot {n} ! ! now", f"Tie knot {n}") for n in (3, 4)
    ]


def test_nothing_left_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.advbench\.skip=4: .* has 4 rows"):
        items(tmp_path, skip=4)
