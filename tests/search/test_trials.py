"""Who goes on, who wins, and the table of the trials."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.errors import UserError
from bdpo.search.trials import (
    asha_promotes,
    check_rungs,
    end_of,
    is_promoted,
    results_table,
    rung_steps,
    winner,
)
from tests.support.sweeps import NAN, configured, seven_trials_and_a_failed_one, trial


class TestRungs:
    @given(
        st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.5]), min_size=1, max_size=20),
        st.sampled_from([2, 3, 4.0]),
    )
    def test_who_goes_on_is_what_ray_tune_decides(self, scores, factor):
        from ray.tune.schedulers.async_hyperband import _Bracket

        class Named:
            def __init__(self, name):
                self.trial_id = name

        bracket = _Bracket(1, 1, factor, 0)
        for number, score in enumerate(scores):
            theirs = bracket.on_result(Named(str(number)), 1, score)
            assert (theirs == "CONTINUE") == asha_promotes(score, scores[:number], factor)

    @given(st.integers(1, 10_000), st.lists(st.integers(1, 99), unique=True, max_size=4))
    def test_steps(self, total, percents):
        shares = [*sorted(percent / 100 for percent in percents), 1.0]
        exact = [math.ceil(round(share * 100) * total / 100) for share in shares]
        if len(set(exact)) == len(exact):
            assert rung_steps(shares, total) == exact
        else:
            with pytest.raises(UserError, match=r"tune\.rungs"):
                rung_steps(shares, total)

    def test_rungs_that_some_trial_cannot_have_are_refused_for_all(self):
        config = configured(space={"train.max_steps": {"min": 3, "max": 9}}, rungs=[0.5, 0.6, 1.0])
        with pytest.raises(UserError, match=r"of 3 steps these are \[2, 2, 3\]"):
            check_rungs(config, 640)
        check_rungs(configured(space={"train.max_steps": {"min": 5, "max": 9}}, rungs=[0.5, 1.0]), 640)

    def test_who_was_there_decides_and_neither_a_clock_nor_the_order_of_reading(self):
        tune = configured().tune
        trials = [
            trial(0, (0.5, 1, 12.0)),
            trial(1, (0.4, 1, 10.0), before=[0]),
            trial(2, (0.45, 1, 11.0), before=[0, 1]),
        ]
        for order in (trials, trials[::-1]):
            # the first is always promoted; 0.4 < median(0.5); 0.45 >= median(0.5, 0.4)
            assert [is_promoted(t, order, tune) for t in trials] == [True, False, True]
            assert [end_of(t, order, tune) for t in trials] == ["open", "stopped", "open"]

    def test_a_completed_trial_stays_completed(self):
        tune = configured().tune
        best = trial(0, *[(0.9, 1, float(t)) for t in range(3)])
        worst = trial(1, *[(0.1, 1, float(t)) for t in range(5, 8)], failure=NAN)
        assert [end_of(t, [best, worst], tune) for t in (best, worst)] == ["completed", "completed"]


def test_the_winner_is_feasible_safest_then_most_compliant_then_first():
    tune = configured().tune

    def done(number, safety, compliance):
        return trial(number, *[(safety, compliance, float(number))] * 3)

    refuses_all, stopped = done(0, 1.0, 0.2), trial(1, (0.99, 1.0, 0.0))
    a, b, c = done(2, 0.8, 0.96), done(3, 0.8, 0.98), done(4, 0.8, 0.98)
    assert winner([refuses_all, stopped, a, b, c], tune) is b
    assert winner([refuses_all, stopped], tune) is None


def test_a_trial_exactly_at_the_bound_may_win():
    """1 − 0.05 of the base model's compliance: a violation of 0 is none."""
    tune = configured().tune
    at, beyond = trial(0, *[(0.8, 0.95, 0.0)] * 3), trial(1, *[(0.9, 0.949, 1.0)] * 3)
    assert winner([at, beyond], tune) is at
    rows = results_table([at, beyond], tune).to_pylist()
    assert [row["feasible"] for row in rows] == [True, False]
    assert [row["least"] for row in rows] == [0.95, 0.95]
    assert [row["step"] for row in rows] == [24, 24]  # of the last of three rungs


def test_the_last_rung_decides_who_wins():
    tune = configured().tune
    early = trial(0, (0.2, 1.0, 0.0), (0.9, 1.0, 1.0), (0.5, 1.0, 2.0))
    late = trial(1, (0.1, 1.0, 0.0), (0.3, 0.5, 1.0), (0.6, 1.0, 2.0))
    assert winner([early, late], tune) is late


@pytest.fixture
def trials():
    return seven_trials_and_a_failed_one()


def test_a_row_a_trial(trials):
    tune = configured().tune
    rows = results_table(trials, tune).to_pylist()
    assert [r["trial"] for r in rows] == [t.name for t in trials]
    assert [r["winner"] for r in rows].index(True) == 2  # of those with compliance 0.95 and more
    assert rows[7]["status"] == "failed"
    assert rows[7]["error"] == NAN.error
    assert rows[7]["objective"] is None
    assert rows[3]["objective"] == pytest.approx(0.3 + 0.08 * 3)
    assert [r["method.alpha"] for r in rows] == [t.params["method.alpha"] for t in trials]
