"""Two models on the same prompts: the difference item by item, its interval, and a p-value.

Paired, because the same prompts are hard for both models: much smaller differences show than between two
intervals. Corrections for looking at many measures are left out; the table shows how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import pyarrow as pa
import pyarrow.compute as pc

from bdpo.evaluation.benchmarks.base import Benchmark, Measure, Row
from bdpo.evaluation.benchmarks.registry import BENCHMARKS
from bdpo.evaluation.measures import DECIDED, clusters
from bdpo.stats import Difference, paired_difference

MeasureKey = tuple[str, str]
"""(benchmark, measure), the measure with its category behind it where the benchmark is compared by category:
`("prefill", "safety, 005 tokens")`."""


@dataclass(frozen=True)
class Comparison:
    """How the second of two models differs from the first in one measure."""

    benchmark: str
    measure: str
    difference: Difference
    models: tuple[str, str] = ("", "")


def compare(first: pa.Table, second: pa.Table) -> list[Comparison]:
    """Every measure of two tables of scores: `second` − `first` over the items that both have.

    Benchmarks that put one request into every category (attack, depth, wrapper) are compared by category.
    Items without a verdict in either are left out of the pair, and `n` is how many remain. A measure
    with the values of one before it on the same items is left out: under a judge of yes and no `safe_rate` is
    `safety`.
    """
    results: list[Comparison] = []
    others, of = item_values(second), item_clusters(first)
    tested: list[tuple[str, list[str], list[float], list[float]]] = []
    for (benchmark, measure), values in item_values(first).items():
        other = others.get((benchmark, measure), {})
        both = [item for item in other if item in values]
        a, b = ([side[item] for item in both] for side in (values, other))
        values_of_both = (benchmark, both, a, b)
        if both and values_of_both not in tested:
            tested.append(values_of_both)
            difference = paired_difference(a, b, [of[item] for item in both])
            results.append(Comparison(benchmark, measure, difference))
    return results


def item_values(scores: pa.Table) -> dict[MeasureKey, dict[str, float]]:
    """Of each measure that is compared: item id -> what the item adds; items without verdict are left out."""
    found: dict[MeasureKey, dict[str, float]] = {}
    for benchmark in BENCHMARKS.values():
        parts: dict[str, list[Row]] = {}
        for row in judged_rows(scores, benchmark):
            parts.setdefault(f", {row['category']}" if benchmark.asks_again else "", []).append(row)
        for measure in benchmark.measures:
            for part, rows in sorted(parts.items()) if measure.compared else ():
                found[benchmark.name, measure.name + part] = values_of(measure, rows)
    return {key: values for key, values in found.items() if values}


def judged_rows(scores: pa.Table, benchmark: Benchmark) -> list[Row]:
    """The rows of a benchmark whose verdict has what it measures."""
    rows = scores.filter(pc.equal(scores["benchmark"], benchmark.name)).to_pylist()
    return [row for row in rows if row[DECIDED[benchmark.rubric]] is not None]


def values_of(measure: Measure, rows: Iterable[Row]) -> dict[str, float]:
    """Item id -> what the item adds to the measure; items that add nothing are left out."""
    return {row["item_id"]: value for row in rows if (value := measure.value(row)) is not None}


def item_clusters(scores: pa.Table) -> dict[str, str]:
    """Item id -> what it asks about, see `Item.cluster`."""
    rows = scores.select(["item_id", "cluster"]).to_pylist()
    return dict(zip(scores["item_id"].to_pylist(), clusters(rows), strict=True))


def compare_all(scores: dict[str, pa.Table]) -> list[Comparison]:
    """`compare` for every two models, in the order given."""
    return [
        Comparison(row.benchmark, row.measure, row.difference, (first, second))
        for first, second in combinations(scores, 2)
        for row in compare(scores[first], scores[second])
    ]
