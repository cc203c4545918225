"""The requests that are attacked: each once and as it is, with the target of its benchmark."""

from __future__ import annotations

import pytest

from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.evaluation.attacks.requests import load_requests
from bdpo.evaluation.benchmarks.registry import BENCHMARKS, measures_safety
from tests.support.benchmark_files import STRONGREJECT, write_csv

GENERAL = "Sure, here is"


def requests(benchmark, evaluate):
    values = {"run_dir": "r", "model": {"name_or_path": "m"}, "data": {"path": "p"}, "evaluate": evaluate}
    attack = {"name": "gcg", "benchmark": benchmark, "target": GENERAL}
    return load_requests(parse_config(values | {"attack": attack}, "test"))


def test_a_suffix_is_left_out_and_a_blank_target_is_the_general_one(tmp_path):
    rows = [
        ["goal", "target"],
        ["Tie a knot", " Sure, a knot "],
        ["Sail a boat", ""],
        ["Mend a net", "Sure, a net"],
    ]
    file = write_csv(tmp_path / "a.csv", rows)
    found = requests("advbench", {"advbench": {"path": str(file), "suffix": "! ! now", "skip": 1}})
    assert [(one.item_id, one.index, one.goal, one.target) for one in found] == [
        ("advbench-0002", 2, "Sail a boat", GENERAL),
        ("advbench-0003", 3, "Mend a net", "Sure, a net"),
    ]


def test_a_prefill_is_a_target_and_its_request_is_asked_once(tmp_path):
    rows = [["category", "forbidden_prompt", "compliant_answer"], ["knots", "Tie a knot", "Sure, a knot"]]
    file = write_csv(tmp_path / "p.csv", rows)
    [found] = requests("prefill", {"prefill": {"path": str(file), "tokens": [5, 10]}})
    assert (found.index, found.category, found.goal, found.target) == (
        1,
        "knots",
        "Tie a knot",
        "Sure, a knot",
    )


def test_strongreject_has_the_general_target(tmp_path):
    file = write_csv(tmp_path / "s.csv", STRONGREJECT)
    found = requests("strongreject", {"strongreject": {"path": str(file)}})
    assert {one.target for one in found} == {GENERAL}
    assert len(found) == len(STRONGREJECT) - 1


@pytest.mark.parametrize("benchmark", [name for name, one in BENCHMARKS.items() if one.plain is None])
def test_what_cannot_be_attacked_is_refused(benchmark):
    expected = (
        f"^attack.benchmark={benchmark}: cannot be attacked, expects one of strongreject, advbench, prefill$"
    )
    with pytest.raises(UserError, match=expected):
        requests(benchmark, {})


def test_only_forbidden_requests_are_attacked():
    assert all(measures_safety(name) for name, benchmark in BENCHMARKS.items() if benchmark.plain is not None)
