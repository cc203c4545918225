"""Estimates with confidence intervals: rates, means, clustered bootstrap, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE_LEVEL = 0.95

RESAMPLES = 9999

ENDS = {"": "value", "_low": "low", "_high": "high"}
"""Endings of a column's name -> the attribute of the estimate in it."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; all of it is None where nothing was measured."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    interval: str | None
    """How the interval was made: `wilson`, `bootstrap`, `cluster bootstrap`, `t`; `none` leaves all open."""

    @property
    def known(self) -> float:
        """The value, of something that was measured; raises a ValueError if it was not."""
        if self.value is None:
            raise ValueError("nothing was measured")
        return self.value

    def columns(self, name: str) -> dict[str, float | None]:
        """`name`, `name_low` and `name_high`, as tables have them."""
        return {f"{name}{end}": getattr(self, attribute) for end, attribute in ENDS.items()}


@dataclass(frozen=True)
class Difference:
    """How the second of two paired samples differs from the first."""

    n: int
    first: float
    second: float
    difference: float
    """Mean of `second` − `first`."""
    low: float | None
    """95 % interval of the difference; None where all pairs differ by the same."""
    high: float | None
    p: float
    """Two-sided."""
    test: str
    """`mcnemar` or `permutation`."""


def p_value(p: float) -> str:
    """How it is written."""
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def paired_difference(first: Sequence[float], second: Sequence[float], of: Sequence[str] = ()) -> Difference:
    """Mean of `second` − `first`, pair by pair, with a 95 % interval and a two-sided p-value.

    `of` names the cluster of each pair: intervals and p are over clusters, for pairs of one are not
    independent. The interval is a percentile bootstrap; none if all differences are the same, which says
    nothing about others. The p-value of outcomes that are all 0 or 1 and stand alone is McNemar's exact one,
    the sign test of the pairs that differ; of others that of a sign-flip permutation test, which is that
    test's extension and holds its level where a bootstrap p-value is too small. Seeded: the same numbers
    every time.
    """
    from scipy.stats import binomtest, bootstrap, permutation_test

    a, b = np.asarray(first, float), np.asarray(second, float)
    difference = b - a
    sums, sizes = cluster_sums(difference, of)
    low = high = None
    if np.ptp(sums / sizes) > 0:
        interval = bootstrap(
            (sums, sizes), ratio, paired=True, confidence_level=CONFIDENCE_LEVEL, method="percentile", rng=0
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    if len(sizes) == len(a) and set(a) | set(b) <= {0.0, 1.0}:
        test, changed = "mcnemar", int(np.count_nonzero(difference))
        p = binomtest(int((difference > 0).sum()), changed).pvalue if changed else 1.0
    else:
        test = "permutation"
        p = 1.0
        if len(sums) > 1 and sums.any():
            p = permutation_test(
                (sums, np.zeros_like(sums)),
                _mean_difference,
                permutation_type="samples",
                n_resamples=RESAMPLES,
                rng=0,
            ).pvalue
    return Difference(
        n=len(a),
        first=float(a.mean()),
        second=float(b.mean()),
        difference=float(difference.mean()),
        low=low,
        high=high,
        p=float(p),
        test=test,
    )


def _mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(np.mean(a - b, axis=axis))


def rate(outcomes: Sequence[bool], of: Sequence[str] = ()) -> Estimate:
    """The share of true outcomes, with its interval; see `mean`."""
    return mean([float(outcome) for outcome in outcomes], of)


def mean(values: Sequence[float], of: Sequence[str] = ()) -> Estimate:
    """The mean of values in [0, 1] with its 95 % interval; `of` names the cluster of each.

    A percentile bootstrap, of clusters where values share them (seeded, so always the same). The Wilson
    interval of values that are all 0 or 1 and stand alone; of as many as there are clusters where all are 0
    or all are 1, for the bootstrap of ten times 1 would be certain. One value alone, or clusters that are all
    the same, leave everything open.
    """
    from scipy.stats import binomtest, bootstrap

    n = len(values)
    if n == 0:
        return Estimate(None, None, None, 0, None)
    sums, sizes = cluster_sums(values, of)
    value, count = float(np.mean(values)), len(sizes)
    if set(values) <= {0, 1} and (count == n or value in (0, 1)):
        wilson = binomtest(round(value * count), count).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
        return _estimate(value, wilson.low, wilson.high, n, "wilson")
    if np.ptp(sums / sizes) == 0:
        return _estimate(value, 0.0, 1.0, n, "none")
    bounds = bootstrap(
        (sums, sizes),
        ratio,
        paired=True,
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return _estimate(value, bounds.low, bounds.high, n, "bootstrap" if count == n else "cluster bootstrap")


def cluster_sums(values: Sequence[float] | np.ndarray, of: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(the sum of the values, their number) of each cluster; of each value where `of` is empty."""
    if not len(of):
        return np.asarray(values, float), np.ones(len(values))
    _, number = np.unique(np.asarray(of), return_inverse=True)
    return np.bincount(number, weights=values), np.bincount(number).astype(float)


def ratio(sums: np.ndarray, sizes: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean over all that clusters hold, for scipy's resampling."""
    return np.asarray(sums.sum(axis) / sizes.sum(axis))


def mean_of_many(values: np.ndarray) -> Estimate:
    """The mean of values without bounds and its interval by Student's t; nan bounds for one value."""
    from scipy import stats

    n, value = len(values), float(np.mean(values))
    reach = stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, n - 1) * stats.sem(values) if n > 1 else np.nan
    return _estimate(value, value - reach, value + reach, n, "t")


def _estimate(value: float, low: float, high: float, n: int, interval: str) -> Estimate:
    """Rounding must not put the value outside its own interval."""
    return Estimate(value, min(float(low), value), max(float(high), value), n, interval)
