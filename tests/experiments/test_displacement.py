"""Likelihood displacement, by ranks and sums of the test's own."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.experiments.displacement import SIGNS, displaced_pairs, displacement, displacement_figure


def scores(logps, ches=None, groups=None, ids=None, rejected=None):
    n = len(logps)
    return pa.table(
        {
            "pair_id": ids or [f"p{i}" for i in range(n)],
            "group": pa.array(groups or [None] * n, pa.string()),
            "ref_chosen_logps": pa.array(logps, pa.float32()),
            "ref_rejected_logps": pa.array(rejected or [0.0] * n, pa.float32()),
            "mi_chosen": pa.array([0.1 * i for i in range(n)], pa.float32()),
            "mi_rejected": pa.array([0.2] * n, pa.float32()),
            "ches": pa.array(ches or [float(i) for i in range(n)], pa.float32()),
        }
    )


def ranks(values):
    """Of distinct values."""
    order = sorted(values)
    return [order.index(value) for value in values]


def test_the_change_is_the_mean_over_models_whatever_their_order():
    before = scores([-1.0, -2.0, -3.0])
    first = scores([-2.0, -2.0, -1.0], rejected=[1.0, 2.0, 3.0])
    second = scores([-2.0, -2.0, -5.0], ids=["p2", "p1", "p0"], rejected=[-30.0, -20.0, -10.0])
    pairs = displaced_pairs(before, [first, second])
    assert pairs["change_rejected"].to_pylist() == [(1 - 10) / 2, (2 - 20) / 2, (3 - 30) / 2]
    assert pairs["change"].to_pylist() == [(-1 - 4) / 2, 0.0, (2 + 1) / 2]
    assert pairs["imbalance"].to_pylist() == pytest.approx([0.2, 0.1, 0.0], abs=1e-6)


def test_scores_of_other_pairs_are_refused():
    with pytest.raises(ValueError, match="other pairs"):
        displaced_pairs(scores([-1.0, -2.0]), [scores([-1.0, -2.0], ids=["p0", "x"])])


@given(st.integers(5, 40), st.randoms(use_true_random=False))
def test_correlations_are_of_the_ranks(n, rng):
    ches, change = rng.sample(range(1000), n), rng.sample(range(-500, 500), n)
    before = scores([0.0] * n, ches=list(map(float, ches)))
    [row] = displacement(displaced_pairs(before, [scores(list(map(float, change)))]))
    assert row["ches"] == pytest.approx(statistics.correlation(ranks(ches), ranks(change)), abs=1e-9)
    if abs(row["ches"]) < 1 - 1e-9:
        assert row["ches_low"] < row["ches"] < row["ches_high"]
    else:
        assert math.isnan(row["ches_low"])
        assert math.isnan(row["ches_high"])
    assert row["fell"] == sum(value < 0 for value in change) / n
    assert row["change"] == pytest.approx(statistics.mean(change))
    assert math.isnan(row["mi_rejected"])  # the same of all pairs


def test_the_interval_of_a_correlation_holds_it_as_often_as_it_says():
    """Normal pairs of correlation 0.5, whose Spearman's ρ is 6/π·asin(0.25)."""
    rng, held, true = np.random.default_rng(0), 0, 6 / math.pi * math.asin(0.25)
    for _ in range(200):
        x, noise = rng.standard_normal((2, 60))
        before = scores([0.0] * 60, ches=list(x))
        [row] = displacement(displaced_pairs(before, [scores(list(0.5 * x + math.sqrt(0.75) * noise))]))
        held += row["ches_low"] <= true <= row["ches_high"]
    assert 180 <= held <= 198


def test_groups_are_told_apart_and_what_is_not_known_stays_open():
    groups = ["safe"] * 6 + ["unsafe"] * 6
    before = scores([-5.0] * 12, groups=groups, ches=[None] * 12)
    rows = displacement(displaced_pairs(before, [scores([-4.0] * 6 + [-7.0] * 6)]))
    assert [(row["group"], row["pairs"], row["fell"], row["change"]) for row in rows] == [
        ("all", 12, 0.5, -0.5),
        ("safe", 6, 0.0, 1.0),
        ("unsafe", 6, 1.0, -2.0),
    ]
    for name in ("ches", "lowest_ches", "highest_ches"):
        assert all(math.isnan(row[name + end]) for row in rows for end in ("", "_low", "_high"))


def test_what_became_of_the_rejected_and_of_the_tenths_by_ches():
    """With Student's interval, t of 39 and of 3 degrees of freedom from a table."""
    rng = random.Random(0)
    ches, change, rejected = (rng.sample(range(-500, 500), 40) for _ in range(3))
    before = scores([0.0] * 40, ches=list(map(float, ches)))
    after = scores(list(map(float, change)), rejected=list(map(float, rejected)))
    [row] = displacement(displaced_pairs(before, [after]))
    ordered = sorted(range(40), key=ches.__getitem__)
    tenths = [[change[i] for i in part] for part in (ordered[:4], ordered[-4:])]
    expected = {"lowest_ches": tenths[0], "highest_ches": tenths[1], "change_rejected": rejected}
    for name, values in expected.items():
        t = 2.022691 if len(values) == 40 else 3.182446
        reach = t * statistics.stdev(values) / len(values) ** 0.5
        assert row[name] == pytest.approx(statistics.mean(values))
        assert row[f"{name}_low"] == pytest.approx(statistics.mean(values) - reach)
        assert row[f"{name}_high"] == pytest.approx(statistics.mean(values) + reach)


@pytest.mark.parametrize("sign", SIGNS)
def test_the_figure_has_a_line_an_arm_of_the_means_of_tenths(sign):
    rng = random.Random(0)
    before = scores([0.0] * 40, ches=[float(i) for i in range(40)])
    arms = {
        name: displaced_pairs(before, [scores([rng.gauss(0, 1) for _ in range(40)])])
        for name in ("dpo", "bdpo")
    }
    [axes] = displacement_figure(arms, sign).axes
    assert axes.get_xlabel() == f"tenths of the pairs by {SIGNS[sign]}"
    shown = [container.lines[0].get_ydata() for container in axes.containers]
    for name, line in zip(arms, shown, strict=True):
        ordered = sorted(range(40), key=lambda i: arms[name][sign][i].as_py())
        change = arms[name]["change"].to_pylist()
        tenths = [statistics.mean(change[i] for i in ordered[4 * t : 4 * t + 4]) for t in range(10)]
        assert list(line) == pytest.approx(tenths)
