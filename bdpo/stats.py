"""Estimates with confidence intervals: rates, means over clusters, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE_LEVEL = 0.95

RESAMPLES = 9999

DRAWS = 4999

ENDS = {"": "value", "_low": "low", "_high": "high"}
"""Endings of a column's name -> the attribute of the estimate in it."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; all of it is None or NaN where nothing was measured."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    interval: str | None
    """How it was made: `exact` (Clopper–Pearson), `gaffke`, `cluster gaffke`, `t`, or `Fisher's z`."""
    clusters: int | None = None
    """How many independent parts the values are in, where that was counted."""

    @property
    def known(self) -> float:
        """The value, of something that was measured; raises a ValueError if it was not."""
        if self.value is None:
            raise ValueError("nothing was measured")
        return self.value

    def columns(self, name: str) -> dict[str, float | None]:
        """`name`, `name_low` and `name_high`, as tables have them."""
        return {f"{name}{end}": getattr(self, attribute) for end, attribute in ENDS.items()}


SIGNIFICANT = 0.05
"""Below it a p-value counts as a difference."""


@dataclass(frozen=True)
class Difference:
    """How the second of two paired samples differs from the first."""

    n: int
    first: float
    second: float
    difference: float
    """Mean of `second` − `first`."""
    low: float
    """95 % interval of the difference."""
    high: float
    p: float
    """Two-sided."""
    test: str
    """`mcnemar` or `permutation`."""

    @property
    def is_clear(self) -> bool:
        """Whether test and interval agree that there is a difference; they are not made of each other."""
        return self.p < SIGNIFICANT and (self.low > 0 or self.high < 0)


def p_value(p: float) -> str:
    """How it is written."""
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def points(share: float) -> str:
    """A difference of shares in percentage points, as `+3.1`; what rounds to zero has no minus."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def points_of(share: float | None, low: float | None, high: float | None) -> str:
    """A difference of shares with its interval, as `+3.1 (-0.4 to +6.5)`; empty where there is none."""
    if share is None or low is None or high is None:
        return ""
    return f"{points(share)} ({points(low)} to {points(high)})"


def percent_of(share: float | None, low: float | None, high: float | None) -> str:
    """A share in percent with its interval, as `83.1 (79.6–86.5)`; empty where there is none."""
    if share is None or low is None or high is None:
        return ""
    return f"{100 * share:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str] = ()
) -> Difference:
    """Mean of `second` − `first`, pair by pair, with a 95 % interval and a two-sided p-value.

    Values are in [0, 1]. `clusters` has the name of each pair's cluster: interval and p are over clusters,
    for pairs of one are not independent. The interval is that of `mean` for the differences, in [−1, 1]. The
    p-value of outcomes that are all 0 or 1 and stand alone is McNemar's exact one, the sign test of the pairs
    that differ; of others that of a sign-flip permutation test, which is that test's extension and holds its
    level where a bootstrap p-value is too small. Seeded: the same numbers every time.
    """
    from scipy.stats import binomtest, permutation_test

    a, b = np.asarray(first, float), np.asarray(second, float)
    difference = b - a
    sums, sizes = cluster_sums(difference, clusters)
    low, high = bounded_interval((sums + sizes) / 2, sizes)  # of (d + 1) / 2, which is in [0, 1]
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
        low=min(2 * float(low) - 1, float(difference.mean())),
        high=max(2 * float(high) - 1, float(difference.mean())),
        p=float(p),
        test=test,
    )


def _mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(np.mean(a - b, axis=axis))


def rate(outcomes: Sequence[bool], clusters: Sequence[str] = ()) -> Estimate:
    """The share of true outcomes, with its interval; see `mean`."""
    return mean([float(outcome) for outcome in outcomes], clusters)


def mean(values: Sequence[float], clusters: Sequence[str] = ()) -> Estimate:
    """The mean of values in [0, 1] with its 95 % interval; `clusters` has each value's.

    Values that are all 0 or 1 and stand alone have the exact interval of Clopper and Pearson, all others that
    of `bounded_interval`, over clusters where values share them. Seeded: the same numbers every time.
    """
    n = len(values)
    if n == 0:
        return Estimate(None, None, None, 0, None)
    sums, sizes = cluster_sums(values, clusters)
    value, count = float(np.mean(values)), len(sizes)
    if set(values) <= {0, 1} and count == n:
        from scipy.stats import binomtest  # takes as long to import as the other intervals to compute

        exact = binomtest(round(value * n), n).proportion_ci(CONFIDENCE_LEVEL, method="exact")
        return _estimate(value, (exact.low, exact.high), n, "exact", count)
    bounds = bounded_interval(sums, sizes)
    return _estimate(value, bounds, n, "gaffke" if count == n else "cluster gaffke", count)


def bounded_interval(
    sums: np.ndarray, sizes: np.ndarray, draws: int = DRAWS
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a mean of values in [0, 1] that come in independent clusters.

    Gaffke's bound (Gaffke 2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean
    of a nonnegative variable"; restated by Learned-Miller & Thomas, arXiv 1905.06208), with a cluster as the
    unit: the Bayesian bootstrap of Σ sums / Σ sizes with one cluster added that holds zeros for the lower end
    and ones for the upper end. Its size is Σ sizes² / Σ sizes, that of the cluster which a value is in on
    average: unequal clusters count as so many equal ones as Kish's effective number says. (With one of mean
    size a few large clusters of equal values would leave the true mean out in up to 12 % of samples.) For
    single values of 0 and 1 it is Clopper–Pearson. There are no special cases: a single cluster leaves nearly
    all of [0, 1] open, and ten times 1 is not certain. A percentile bootstrap covers 80 to 88 % where
    clusters are few or rates near 1; `benchmarks/coverage.py` simulates both.

    Args:
        sums: the sum of the values of each cluster, shape (…, clusters).
        sizes: the number of values of each cluster, same shape.
        draws: how often the weights of the clusters are drawn.

    Returns:
        The lower and the upper ends, shape (…).
    """
    tail, added = (1 - CONFIDENCE_LEVEL) / 2, np.asarray((sizes**2).sum(-1) / sizes.sum(-1))[..., None]
    lows, highs = [], []
    rng, clusters = np.random.default_rng(0), sums.shape[-1]
    rows = max(1, 4_000_000 // (clusters + 1))  # of weights at a time, some 32 MB
    for first in range(0, draws, rows):
        weights = rng.exponential(size=(min(rows, draws - first), clusters + 1))
        own, extra = weights[:, :-1].T, weights[:, -1] * added
        total, count = sums @ own, sizes @ own + extra
        lows.append(total / count)
        highs.append((total + extra) / count)
    low = np.quantile(np.concatenate(lows, -1), tail, axis=-1, method="lower")
    high = np.quantile(np.concatenate(highs, -1), 1 - tail, axis=-1, method="higher")
    return low, high


def cluster_sums(
    values: Sequence[float] | np.ndarray, clusters: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(the sum of the values, their number) of each cluster; of each value where `clusters` is empty."""
    if not len(clusters):
        return np.asarray(values, float), np.ones(len(values))
    _, number = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(number, weights=values), np.bincount(number).astype(float)


def widen(value: float, bounds: tuple[float, float], reach: float) -> tuple[float, float]:
    """The interval of a difference in [−1, 1], widened in quadrature by an independent error of half-width
    `reach`."""
    low, high = bounds
    down, up = float(np.hypot(value - low, reach)), float(np.hypot(high - value, reach))
    return max(value - down, -1.0), min(value + up, 1.0)


def mean_of_many(values: np.ndarray) -> Estimate:
    """The mean of values without bounds and its interval by Student's t; nan bounds for one value."""
    from scipy import stats

    n, value = len(values), float(np.mean(values))
    reach = stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, n - 1) * stats.sem(values) if n > 1 else np.nan
    return _estimate(value, (value - reach, value + reach), n, "t", n)


def _estimate(
    value: float, bounds: tuple[float | np.ndarray, float | np.ndarray], n: int, interval: str, clusters: int
) -> Estimate:
    """Rounding must not put the value outside its own interval."""
    low, high = (float(bound) for bound in bounds)
    return Estimate(value, min(low, value), max(high, value), n, interval, clusters)
