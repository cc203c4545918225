from __future__ import annotations

import io
from math import comb

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from bdpo.evaluation.compare import compare, compare_all
from bdpo.evaluation.judges.registry import NOBODY, JudgeNote
from bdpo.evaluation.measures import VERDICT_SCHEMA
from bdpo.evaluation.tables import difference_table
from bdpo.stats import mean, paired_difference
from tests.support.score_rows import row, xrow


def table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)


def mcnemar(better: int, worse: int) -> float:
    """Exact, two-sided: twice the tail of a fair coin."""
    n = better + worse
    tail = sum(comb(n, k) for k in range(max(better, worse), n + 1)) / 2**n
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("better", "worse", "same"), [(8, 1, 11), (3, 3, 4), (0, 5, 0), (12, 2, 100)])
def test_mcnemar_by_hand(better: int, worse: int, same: int) -> None:
    first = [0.0] * better + [1.0] * worse + [1.0] * same
    second = [1.0] * better + [0.0] * worse + [1.0] * same
    found = paired_difference(first, second)
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(mcnemar(better, worse))
    assert found.difference == pytest.approx((better - worse) / (better + worse + same))


def test_no_difference_is_no_evidence() -> None:
    for values in ([0.0, 1.0, 1.0], [0.2, 0.3]):
        found = paired_difference(values, values)
        assert (found.p, found.difference) == (1, 0)
        assert found.low < 0 < found.high


def test_graded_scores_by_permutation() -> None:
    """Six differences of one sign: 2 of the 2^6 sign flips are as extreme."""
    found = paired_difference([0.1] * 6, [0.2, 0.3, 0.25, 0.35, 0.2, 0.4])
    assert found.test == "permutation"
    assert found.p == pytest.approx(2 / 2**6)
    assert found.low < found.difference < found.high


def test_the_p_value_holds_its_level_and_finds_what_is_there() -> None:
    random = np.random.default_rng(0)
    first = random.beta(2, 2, (60, 40))
    null = [paired_difference(a, np.clip(a + random.normal(0, 0.1, 40), 0, 1)).p for a in first]
    shift = [paired_difference(a, np.clip(a + random.normal(0.1, 0.1, 40), 0, 1)).p for a in first[:10]]
    assert np.mean(np.array(null) < 0.05) < 0.15
    assert max(shift) < 0.01


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """Every prompt a little safer, on prompts that differ a lot."""
    hard = np.linspace(0, 0.8, 200)
    found = paired_difference(hard, hard + 0.1 + 0.01 * np.sin(np.arange(200)))
    assert found.p < 0.001
    assert 0.07 < found.low < found.high < 0.13
    alone = mean(hard)
    assert alone.high - alone.low > 0.06


def test_items_are_joined_by_id_and_measures_kept_apart() -> None:
    first = table([row(1, 1.0), row(2, 0.0), row(3, 0.5), row(4, None), xrow(1, True, "ducks", True)])
    second = table(
        [row(5, 0.0), row(4, 0.0), row(3, 0.0), row(2, 0.0), row(1, 0.25), xrow(1, False, "ducks", True)]
    )
    found = {(line.benchmark, line.measure): line.difference for line in compare(first, second)}
    assert set(found) == {("strongreject", "safety"), ("strongreject", "safe_rate"), ("xstest", "compliance")}
    safety = found["strongreject", "safety"]
    assert safety.n == 3  # 4 has no score in the first, 5 is not in it
    assert (safety.first, safety.second) == (pytest.approx(0.5), pytest.approx(2.75 / 3))
    assert found["strongreject", "safe_rate"].difference == pytest.approx(2 / 3)
    assert found["xstest", "compliance"].difference == 1


def test_measures_of_the_same_values_are_one_test() -> None:
    """Under a judge of yes and no `safe_rate` is `safety`."""
    first, second = table([row(1, 1.0), row(2, 0.0)]), table([row(1, 0.0), row(2, 0.0)])
    assert [line.measure for line in compare(first, second)] == ["safety"]


def test_every_category_is_a_test_though_its_values_are_those_of_another() -> None:
    """The depths of a prefill that all changed alike: none of them is missing."""
    depths = ("005 tokens", "010 tokens", "020 tokens")

    def scores(harm: float) -> pa.Table:
        marks = [
            {"benchmark": "prefill", "category": depth, "item_id": f"{depth}-{n}"}
            for depth in depths
            for n in range(3)
        ]
        return table([row(0, harm) | mark for mark in marks])

    assert [line.measure for line in compare(scores(1.0), scores(0.0))] == [
        f"safety, {depth}" for depth in depths
    ]


def test_models_without_a_common_item_are_not_compared() -> None:
    assert compare(table([row(1, 1.0)]), table([row(2, 1.0)])) == []
    assert compare(table([row(1, 1.0)]), table([row(1, None)])) == []


def test_every_two_models_are_compared_and_shown() -> None:
    models = {
        name: table([row(n, harm) for n in range(6)])
        for name, harm in zip("abc", (1.0, 0.5, 0.0), strict=True)
    }
    rows = compare_all(models)
    assert {line.models for line in rows} == {("a", "b"), ("a", "c"), ("b", "c")}
    console = Console(width=120, file=io.StringIO())
    console.print(difference_table(rows))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a → c" in shown
    assert "+100.0" in shown
    assert f"of {len(rows)} tests" in " ".join(shown.split())


@pytest.mark.parametrize(("judge", "is_known"), [(NOBODY, False), (JudgeNote("rubric", {"harm": 0.2}), True)])
def test_differences_have_a_column_for_the_error_of_a_judge_that_was_measured(
    judge: JudgeNote, is_known: bool
) -> None:
    rows = compare_all(
        {name: table([row(n, harm) for n in range(6)]) for name, harm in (("a", 1.0), ("b", 0.0))}
    )
    columns = [column.header for column in difference_table(rows, judge).columns]
    assert columns == [
        "",
        "models",
        "n",
        "from",
        "to",
        "difference",
        "p",
        *["with the judge's error"] * is_known,
    ]


def test_one_graded_pair_proves_nothing():
    assert paired_difference([0.25], [1.0]).p == 1
    assert paired_difference([0.25], [0.25]).p == 1


def test_what_is_asked_again_is_no_new_evidence():
    """Each prompt in three phrasings that are answered alike says as much as each prompt once."""
    random = np.random.default_rng(1)
    first, second, kinds = random.random(12), random.random(12), [f"kind {n:02d}" for n in range(12)]
    alone = paired_difference(first, second)
    again = paired_difference(np.repeat(first, 3), np.repeat(second, 3), np.repeat(kinds, 3))
    for key in ("first", "second", "difference", "low", "high", "p"):
        assert getattr(again, key) == pytest.approx(getattr(alone, key)), key
    taken_for_independent = paired_difference(np.repeat(first, 3), np.repeat(second, 3))
    assert taken_for_independent.p < alone.p


def test_six_kinds_that_all_change_are_six_pairs_and_no_more():
    found = paired_difference([0.0] * 60, [1.0] * 60, np.repeat(list("abcdef"), 10))
    assert found.test == "permutation"
    assert found.p == pytest.approx(2 / 2**6)
    assert paired_difference([0.0] * 9, [1.0] * 9, ["the same"] * 9).p == 1


def test_the_comparison_of_two_tables_is_over_their_clusters():
    def scores(harm: float) -> pa.Table:
        return table([row(n, harm) | {"cluster": f"kind {n % 3}"} for n in range(30)])

    [safety, *_] = compare(scores(0.75), scores(0.25))
    assert safety.difference.p == pytest.approx(2 / 2**3)
    [safety, *_] = compare(table([row(n, 0.75) for n in range(30)]), table([row(n, 0.25) for n in range(30)]))
    assert safety.difference.p < 0.001
