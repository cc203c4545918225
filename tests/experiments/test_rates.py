"""The learning rate that an arm takes."""

from __future__ import annotations

from bdpo.experiments.arms import Arm
from bdpo.experiments.rates import best_trial
from bdpo.stats import Estimate
from bdpo.variants.objective import Measured


def measured(score, compliance, violation=0.0):
    objective, constrained = (Estimate(value, value, value, 9, "t") for value in (score, compliance))
    return Measured(objective, constrained, 1.0, violation)


def test_the_best_learning_rate_is_that_of_a_search():
    """The safest within the bound; of equals the one that complies more; else the nearest to the bound."""
    trials = [Arm(name) for name in "abcd"]
    found = {"a": measured(0.7, 0.9), "b": measured(0.7, 0.95), "c": measured(0.9, 0.5, violation=0.4)}
    assert best_trial(trials, found) == trials[1]
    far = {"a": measured(0.9, 0.2, violation=0.7), "d": measured(0.8, 0.5, violation=0.4)}
    assert best_trial(trials, far) == trials[3]
    assert best_trial(trials, {}) is None
