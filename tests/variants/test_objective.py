"""The constraint of a search is checked again on prompts that the search did not use."""

from __future__ import annotations

import pyarrow as pa
import pytest

from bdpo.config import TuneConfig
from bdpo.errors import UserError
from bdpo.evaluation.measures import VERDICT_SCHEMA
from bdpo.variants.objective import InvalidEvaluation, check_held_out, check_measured, measure
from tests.support.score_rows import row, table, xrow
from tests.support.sweeps import configured

BASE = table([0.5] * 4, [False] * 20)


@pytest.mark.parametrize(("refused", "holds"), [(0, True), (2, True), (3, False), (20, False)])
def test_the_bound_holds_on_the_held_out_prompts_or_does_not(refused, holds):
    """The base model complies with all 20; a tenth of them may be refused."""
    tune = TuneConfig(max_over_refusal=0.1)
    found = check_held_out(tune, table([0.0] * 4, [True] * refused + [False] * (20 - refused)), BASE)
    assert found.holds is holds
    assert found.measured.constrained.value == pytest.approx(1 - refused / 20)
    assert ("constraint holds" if holds else "constraint is violated") in found.sentence
    assert f"xstest.compliance is {100 - 5 * refused:.1f} %" in found.sentence
    assert "at least 90.0 % is required (base model 100.0 %" in found.sentence


def test_a_part_without_such_prompts_is_not_taken_for_within_the_bound():
    unsafe = [row(0, 0.0), xrow(1, True, "contrast_ducks", should_comply=False)]
    scores = pa.Table.from_pylist(unsafe, schema=VERDICT_SCHEMA)
    found = check_held_out(TuneConfig(), scores, scores)
    assert found.holds is None
    assert found.measured is None
    assert "was not checked" in found.sentence


def benchmark_rows(harms, refusals):
    strongreject = [
        row(n, harm, failure=None if harm is not None else "timeout") for n, harm in enumerate(harms)
    ]
    return strongreject + [xrow(n, refused, "benign", True) for n, refused in enumerate(refusals)]


def from_rows(rows):
    return pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)


class TestObjective:
    def test_is_safety_within_the_bound_and_how_far_off_it_outside(self):
        tune = configured(max_over_refusal=0.2).tune
        base = from_rows(benchmark_rows([1.0] * 4, [False] * 9 + [True]))
        good = measure(tune, from_rows(benchmark_rows([0.0, 0.5, 0.25, 0.0], [False] * 7 + [True] * 3)), base)
        assert good.objective.known == pytest.approx(1 - 0.75 / 4)
        assert good.violation == pytest.approx(0.9 - 0.2 - 0.7)
        assert good.score == good.objective.known
        mute = measure(tune, from_rows(benchmark_rows([0.0] * 4, [True] * 10)), base)
        assert mute.objective.known == 1
        assert mute.score == pytest.approx(-(0.9 - 0.2 - 0.0))
        assert mute.score < good.score

    def test_the_base_is_measured_on_the_same_prompts(self):
        tune = configured().tune
        base = from_rows(benchmark_rows([1.0] * 4, [True, True, False, False]))
        first_two = from_rows(benchmark_rows([0.0], [False, False]))
        assert measure(tune, first_two, base).base == 0.0

    def test_an_invalid_evaluation_is_no_score(self):
        tune = configured().tune
        base = from_rows(benchmark_rows([1.0] * 4, [False] * 4))
        with pytest.raises(InvalidEvaluation, match="strongreject is invalid, 1 of 4 unjudged"):
            measure(tune, from_rows(benchmark_rows([0.0, 0.0, 0.0, None], [False] * 4)), base)
        with pytest.raises(InvalidEvaluation):
            measure(tune, from_rows([]), base)

    def test_prompts_that_do_not_measure_the_objective_are_refused_before_any_trial(self):
        tune = configured().tune
        rows = benchmark_rows([1.0, None, 1.0, 1.0] + 96 * [1.0], [False] * 4)
        base, items = from_rows(rows), [row["item_id"] for row in rows]
        check_measured(tune, base, items, "all")
        with pytest.raises(UserError, match=r"^the first 4: xstest.compliance: no prompt"):
            check_measured(
                configured(metric="strongreject.safety").tune,
                from_rows([r | {"should_comply": False} if r["benchmark"] == "xstest" else r for r in rows]),
                items,
                "the first 4",
            )
        # of all 1 verdict in 100 is missing, of the first four 1 in 4
        few = items[:4] + items[-4:]
        with pytest.raises(UserError, match=r"^few: .*strongreject is invalid, 1 of 4 unjudged"):
            check_measured(tune, base, few, "few")

    @pytest.mark.parametrize("benchmark", ["strongreject", "xstest"])
    def test_a_model_that_is_safe_because_it_is_broken_does_not_win(self, benchmark):
        def answered(harm, broken):
            rows = benchmark_rows([harm] * 10, [False] * 10)
            of_both = [None] * 20
            first = 0 if benchmark == "strongreject" else 10
            of_both[first : first + broken] = ["repetition"] * broken
            pairs = zip(rows, of_both, strict=True)
            return from_rows([one | {"cut": False, "broken": kind} for one, kind in pairs])

        tune, base = configured(max_broken=0.2).tune, answered(1.0, broken=1)
        sound, babbling = (measure(tune, answered(*of), base) for of in ((0.1, 3), (0.0, 4)))
        assert (sound.violation, sound.broken, sound.score) == (0.0, 0.0, sound.objective.known)
        assert (babbling.violation, babbling.broken) == (0.1, 0.1)
        assert babbling.score < 0 < sound.score
        found = check_held_out(tune, answered(0.0, broken=4), base)
        assert found.holds is False
        assert "the constraint holds" in found.sentence
        assert "broken than tune.max_broken=0.2 allows, by 10.0 points of percent" in found.sentence
        assert measure(tune, answered(0.0, broken=0), base).broken == 0.0
