"""How often a 95 % interval of the evaluation holds the true mean, by simulation.

    python -m benchmarks.coverage [--samples 1500]

Rates of 0.5 to 0.99, 8 to 313 items in 8 to 100 clusters of unequal sizes (or each item alone), outcomes of
yes and no or graded ones, clusters whose items are independent or alike (intraclass correlation 0, 0.2, 0.5).
Prints, for each shape, the lowest coverage over all rates and correlations, of the interval of
`bdpo.stats.bounded_interval` and of the percentile bootstrap over clusters.
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np

from bdpo.stats import bounded_interval

RATES = (0.5, 0.8, 0.9, 0.95, 0.99)

CORRELATIONS = (0.0, 0.2, 0.5)

SHAPES = (
    (8, 8), (32, 32), (100, 100), (8, 16), (8, 64), (8, 313), (16, 64), (16, 313),
    (24, 100), (50, 100), (50, 313), (100, 313),
)  # fmt: skip
"""(clusters, items)"""

GRADES = 0.8 * np.array([0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0])

RESAMPLES = 1999


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1500, help="of each cell")
    samples = parser.parse_args().samples
    print("| outcomes | clusters | items | lowest coverage | bootstrap's | mean width |")
    print("|---|---|---|---|---|---|")
    for graded, (clusters, items) in product((False, True), SHAPES):
        alike = CORRELATIONS[:1] if clusters == items else CORRELATIONS
        cells = [_cell(graded, clusters, items, rate, rho, samples) for rate, rho in product(RATES, alike)]
        own, other, width = zip(*cells, strict=True)
        name = "graded" if graded else "yes or no"
        numbers = f"{min(own):.3f} | {min(other):.3f} | {np.mean(width):.3f}"
        print(f"| {name} | {clusters} | {items} | {numbers} |", flush=True)


def _cell(
    graded: bool, clusters: int, items: int, rate: float, alike: float, samples: int
) -> tuple[float, float, float]:
    """(coverage, coverage of the bootstrap, mean width) where clusters have rates of a beta distribution."""
    random = np.random.default_rng([graded, clusters, items, int(1000 * rate), int(10 * alike)])
    sizes = _sizes(random, clusters, items, samples)
    own = _rates(random, rate, alike, (samples, clusters))
    true = (
        _mean(_rates(random, rate, alike, (400_000,)), graded)
        if alike
        else float(_mean(np.array(rate), graded))
    )
    sums = _sums(random, own, sizes, graded)
    low, high = bounded_interval(sums, sizes)
    covered = ((low <= true) & (true <= high)).mean()
    weights = random.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES).astype(float)
    means = (sums @ weights.T) / (sizes @ weights.T)
    bootstrap_low, bootstrap_high = np.quantile(means, (0.025, 0.975), axis=-1)
    others = ((bootstrap_low <= true) & (true <= bootstrap_high)).mean()
    return float(covered), float(others), float((high - low).mean())


def _sizes(random: np.random.Generator, clusters: int, items: int, samples: int) -> np.ndarray:
    """At least one item a cluster, the others spread unevenly: shape (samples, clusters)."""
    if clusters == items:
        return np.ones((samples, clusters))
    spread = random.dirichlet(np.ones(clusters), samples)
    return 1.0 + np.stack([random.multinomial(items - clusters, shares) for shares in spread])


def _rates(random: np.random.Generator, rate: float, alike: float, shape: tuple[int, ...]) -> np.ndarray:
    if not alike:
        return np.full(shape, rate)
    spread = 1 / alike - 1
    return random.beta(rate * spread, (1 - rate) * spread, shape)


def _full(rates: np.ndarray) -> np.ndarray:
    """How likely a graded outcome is 1, where it else is one of `GRADES`, for a mean of `rates`."""
    lowest = GRADES.mean()
    return np.clip((rates - lowest) / (1 - lowest), 0, 1)


def _mean(rates: np.ndarray, graded: bool) -> float:
    return float(np.mean(_full(rates) * (1 - GRADES.mean()) + GRADES.mean() if graded else rates))


def _sums(random: np.random.Generator, rates: np.ndarray, sizes: np.ndarray, graded: bool) -> np.ndarray:
    if not graded:
        return random.binomial(sizes.astype(int), rates).astype(float)
    sums = np.zeros_like(sizes)
    for number in range(int(sizes.max())):
        values = np.where(random.random(rates.shape) < _full(rates), 1.0, random.choice(GRADES, rates.shape))
        sums += np.where(number < sizes, values, 0)
    return sums


if __name__ == "__main__":
    main()
