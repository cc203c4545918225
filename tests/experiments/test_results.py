"""What the results of an experiment are, by formulas of the test's own."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.experiments.results import ArmDifference, ArmMeasure, arm_differences, arm_table, item_means
from bdpo.experiments.results import summarise_arms as arm_measures
from tests.support.score_rows import evaluated, table


def summarise_arms(evaluations, reference):
    """As the rows of results.csv."""
    return arm_table(ArmMeasure, arm_measures(evaluations, reference)).to_pylist()


harms = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=3, max_size=3)


@given(st.lists(harms, min_size=1, max_size=4), st.lists(harms, min_size=1, max_size=4))
def test_results_are_means_over_prompts_and_seeds(first, second):
    results = summarise_arms({"a": evaluated(*map(table, first)), "b": evaluated(*map(table, second))}, "a")
    safety = {row["arm"]: row for row in results if row["measure"] == "safety"}
    for arm, seeds in (("a", first), ("b", second)):
        values = [1 - statistics.mean(h) for h in seeds]
        assert safety[arm]["value"] == pytest.approx(statistics.mean(values))
        assert safety[arm]["seed_low"] == pytest.approx(min(values))
        assert safety[arm]["seed_high"] == pytest.approx(max(values))
        assert (safety[arm]["n"], safety[arm]["seeds"]) == (3, len(seeds))
        assert safety[arm]["low"] <= safety[arm]["value"] + 1e-12
        assert safety[arm]["high"] >= safety[arm]["value"] - 1e-12
    assert safety["a"]["p"] is None
    difference = safety["b"]["value"] - safety["a"]["value"]
    assert safety["b"]["difference"] == pytest.approx(difference)


def test_an_arm_that_is_better_everywhere_is_found_to_be():
    worse, better = [1.0] * 10 + [0.5] * 10, [0.5] * 10 + [0.0] * 10
    row = next(
        row
        for row in summarise_arms({"a": evaluated(table(worse)), "b": evaluated(table(better))}, "a")
        if row["arm"] == "b" and row["measure"] == "safety"
    )
    assert row["difference"] == 0.5
    assert 0 < row["difference_low"] < 0.5 <= row["difference_high"]
    assert row["p"] < 0.001


def test_a_prompt_without_verdict_at_one_seed_counts_at_none():
    whole, part = table([0.0, 1.0, 0.5]), table([0.0, None, 0.5])
    assert item_means([{"a": 1.0, "b": 0.0}, {"b": 1.0}]) == ({"b": 0.5}, 1)
    for seeds in ([whole, part], [part, whole]):
        first, *_ = summarise_arms({"a": evaluated(*seeds)}, "a")
        assert (first["value"], first["n"], first["dropped"]) == (0.75, 2, 1)


def test_a_measure_that_a_seed_lacks_is_left_out_whatever_their_order():
    whole, nothing = table([0.0], [False]), table([None], [False])
    for seeds in ([whole, nothing], [nothing, whole]):
        results = summarise_arms({"a": evaluated(*seeds)}, "a")
        assert {row["benchmark"] for row in results} == {"xstest"}


def test_a_comparison_is_of_the_prompts_that_both_arms_have():
    """By hand: the reference lacks the second prompt, on which the other arm is worst."""
    results = summarise_arms({"a": evaluated(table([0.0, None])), "b": evaluated(table([0.0, 1.0]))}, "a")
    row = next(row for row in results if row["arm"] == "b" and row["measure"] == "safety")
    assert (row["value"], row["first"], row["second"], row["paired_n"]) == (0.5, 1.0, 1.0, 1)


def test_every_two_arms_differ_by_what_their_prompts_say():
    """By formula, each prompt's mean over the seeds; and as `summarise_arms` has it."""
    harms = {"a": [[1.0, 0.0, 0.5], [1.0, 1.0, 0.5]], "b": [[0.0, 0.0, 0.25]], "c": [[0.5, None, 0.5]]}
    found = {
        arm: evaluated(*(table(h, [arm == "b"]) for h in seeds), accuracy=[True])
        for arm, seeds in harms.items()
    }
    differences = arm_table(ArmDifference, arm_differences(found)).to_pylist()
    rows = {(row["reference"], row["arm"], row["measure"]): row for row in differences}
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(rows) == [(*pair, measure) for pair in pairs for measure in ("safety", "compliance")]
    safe = {"a": [0.0, 0.5, 0.5], "b": [1.0, 1.0, 0.75], "c": [0.5, None, 0.5]}
    for first, second in pairs:
        both = [(x, y) for x, y in zip(safe[first], safe[second], strict=True) if y is not None]
        row = rows[first, second, "safety"]
        assert row["difference"] == pytest.approx(statistics.mean(y - x for x, y in both))
        assert row["paired_n"] == len(both)
    assert rows["b", "c", "compliance"]["difference"] == 1.0
    for row in summarise_arms(found, "a"):
        if row["arm"] != "a" and row["measure"] in ("safety", "compliance"):
            same = rows["a", row["arm"], row["measure"]]
            assert same == {key: row.get(key) for key in same} | {"reference": "a"}


def test_without_the_reference_nothing_is_tested():
    """The first of those that are left must not take its place."""
    results = summarise_arms({"b": evaluated(table([0.0])), "c": evaluated(table([1.0]))}, "a")
    assert {row["arm"] for row in results} == {"b", "c"}
    assert all(row["p"] is None and row["difference"] is None for row in results)


def test_benchmarks_are_kept_apart():
    results = summarise_arms(
        {"a": evaluated(table([0.0], [False, True, False, False]), accuracy=[True, False])}, "a"
    )
    assert {(row["benchmark"], row["measure"]): row["value"] for row in results} == {
        ("strongreject", "safety"): 1.0,
        ("strongreject", "safe_rate"): 1.0,
        ("xstest", "compliance"): 0.75,
        ("gsm8k", "accuracy"): 0.5,
    }
