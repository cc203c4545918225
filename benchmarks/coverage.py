"""How often a 95 % interval of the evaluation holds the true mean, by simulation.

    python -m benchmarks.coverage [--samples 1000] [--draws 1999] [--evenness 1 0.3]

Rates of 0.5 to 0.99, 8 to 313 items in 8 to 100 clusters (or each item alone), outcomes of yes and no or
graded ones. Sizes of clusters are unequal: Dirichlet with parameter 1, or 0.3, where few clusters hold most
items. Items of a cluster are independent, alike, or all the same (intraclass correlation 0, 0.5, 1). Prints,
for each shape, the lowest coverage over all rates and correlations, of the interval of
`bdpo.stats.bounded_interval` and of the percentile bootstrap over clusters, and the mean width beside that of
the same interval with an added cluster of mean size, as for equal clusters.
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np

from bdpo.stats import bounded_interval

RATES = (0.5, 0.8, 0.9, 0.95, 0.99)

CORRELATIONS = (0.0, 0.5, 1.0)

EVENNESS = (1.0, 0.3)
"""Parameter of the Dirichlet distribution of sizes."""

SHAPES = (
    (8, 8), (32, 32), (100, 100), (8, 16), (8, 64), (8, 313), (16, 64), (16, 313),
    (24, 100), (50, 100), (50, 313), (100, 313),
)  # fmt: skip
"""(clusters, items)"""

GRADES = 0.8 * np.array([0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0])

RESAMPLES = 499


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000, help="of each cell")
    parser.add_argument("--draws", type=int, default=1999, help="of the weights of an interval")
    parser.add_argument("--evenness", type=float, nargs="+", default=EVENNESS, help="of sizes of clusters")
    given = parser.parse_args()
    print(
        "| outcomes | clusters | items | sizes | lowest coverage | bootstrap's | mean width | were it equal |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for graded, (clusters, items), evenness in product((False, True), SHAPES, given.evenness):
        alone = clusters == items
        if alone and evenness != given.evenness[0]:
            continue
        alike = CORRELATIONS[:1] if alone else CORRELATIONS
        shape = (clusters, items, evenness)
        cells = [
            _cell(graded, shape, rate, rho, given.samples, given.draws) for rate, rho in product(RATES, alike)
        ]
        own, other, width, before = zip(*cells, strict=True)
        name, sizes = "graded" if graded else "yes or no", "1" if alone else f"Dirichlet {evenness:g}"
        numbers = f"{min(own):.3f} | {min(other):.3f} | {np.mean(width):.3f} | {np.mean(before):.3f}"
        print(f"| {name} | {clusters} | {items} | {sizes} | {numbers} |", flush=True)


def _cell(
    graded: bool, shape: tuple[int, int, float], rate: float, alike: float, samples: int, draws: int
) -> tuple[float, float, float, float]:
    """(coverage, that of the bootstrap, mean width, that with an added cluster of mean size) where clusters
    have rates of a beta distribution."""
    clusters, items, evenness = shape
    seed = [graded, clusters, items, int(10 * evenness), int(1000 * rate), int(10 * alike)]
    random = np.random.default_rng(seed)
    sizes = _sizes(random, clusters, items, evenness, samples)
    own = _rates(random, rate, alike, (samples, clusters))
    true = (
        _mean(_rates(random, rate, alike, (400_000,)), graded)
        if alike
        else float(_mean(np.array(rate), graded))
    )
    sums = _sums(random, own, sizes, graded)
    low, high = bounded_interval(sums, sizes, draws)
    covered = ((low <= true) & (true <= high)).mean()
    weights = random.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES).astype(float)
    means = (sums @ weights.T) / (sizes @ weights.T)
    bootstrap_low, bootstrap_high = np.quantile(means, (0.025, 0.975), axis=-1)
    others = ((bootstrap_low <= true) & (true <= bootstrap_high)).mean()
    widths = float((high - low).mean()), _width_of_mean_size(random, sums, sizes, draws)
    return float(covered), float(others), *widths


def _width_of_mean_size(
    random: np.random.Generator, sums: np.ndarray, sizes: np.ndarray, draws: int
) -> float:
    weights = random.exponential(size=(draws, sums.shape[-1] + 1))
    own, extra = weights[:, :-1].T, weights[:, -1] * sizes.mean(-1)[:, None]
    total, count = sums @ own, sizes @ own + extra
    ends = np.quantile(total / count, 0.025, axis=-1), np.quantile((total + extra) / count, 0.975, axis=-1)
    return float((ends[1] - ends[0]).mean())


def _sizes(
    random: np.random.Generator, clusters: int, items: int, evenness: float, samples: int
) -> np.ndarray:
    """At least one item a cluster, the others spread unevenly: shape (samples, clusters)."""
    if clusters == items:
        return np.ones((samples, clusters))
    spread = random.dirichlet(np.full(clusters, evenness), samples)
    return 1.0 + np.stack([random.multinomial(items - clusters, shares) for shares in spread])


def _rates(random: np.random.Generator, rate: float, alike: float, shape: tuple[int, ...]) -> np.ndarray:
    if not alike:
        return np.full(shape, rate)
    if alike == 1:
        return (random.random(shape) < rate).astype(float)
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
    whole = random.binomial(sizes.astype(int), _full(rates))
    others = random.multinomial(sizes.astype(int) - whole, np.full(len(GRADES), 1 / len(GRADES)))
    return whole + others @ GRADES


if __name__ == "__main__":
    main()
