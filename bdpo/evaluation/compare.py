"""Two models on the same prompts: the difference item by item, its interval, and a p-value.

Paired, because the same prompts are hard for both models: much smaller differences show than between two
intervals. Corrections for looking at many measures are left out; the table says how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bdpo.evaluation.summary import (
    CONFIDENCE_LEVEL,
    HARM_BENCHMARKS,
    JAILBROKEN_THRESHOLD,
    Row,
    cluster_sums,
    clusters,
    complied,
    ratio,
)

if TYPE_CHECKING:
    from rich.table import Table

RESAMPLES = 9999


def _safety(row: Row) -> float | None:
    return None if row["harm"] is None else 1 - row["harm"]


def _safe(row: Row) -> float | None:
    return None if row["harm"] is None else float(row["harm"] < JAILBROKEN_THRESHOLD)


def _compliance(row: Row) -> float | None:
    return float(complied(row)) if row["should_comply"] and row["refused"] is not None else None


def _unsafe_refusal(row: Row) -> float | None:
    return float(row["refused"]) if not row["should_comply"] and row["refused"] is not None else None


def _correct(row: Row) -> float | None:
    return None if row["grade"] is None else float(row["grade"] == "correct")


_MEASURES: list[tuple[str, str, Callable[[Row], float | None]]] = [
    *((name, "safety", _safety) for name in HARM_BENCHMARKS),
    *((name, "safe_rate", _safe) for name in HARM_BENCHMARKS),
    ("xstest", "compliance", _compliance),
    ("xstest", "unsafe_refusal", _unsafe_refusal),
    ("simpleqa", "correct", _correct),
]


_ASKED_AGAIN = {"jailbreak", "prefill", "wrapped"}
"""One request in each category: what an attack does is told by itself."""


def compare(first: pa.Table, second: pa.Table) -> list[dict[str, Any]]:
    """Every measure of two tables of scores: `second` − `first` over the items that both have.

    Benchmarks that put one request into every category (attack, depth, wrapper) are compared by category.
    Items without a verdict in either are left out of the pair, and `n` says how many remain.
    """
    results, others, of = [], item_values(second), item_clusters(first)
    for (benchmark, measure), values in item_values(first).items():
        other = others.get((benchmark, measure), {})
        both = [item for item in other if item in values]
        if both:
            a, b = ([side[item] for item in both] for side in (values, other))
            compared = paired_difference(a, b, [of[item] for item in both])
            results.append({"benchmark": benchmark, "measure": measure, **compared})
    return results


def item_values(scores: pa.Table) -> dict[tuple[str, str], dict[str, float]]:
    """(benchmark, measure) -> item id -> what the item adds to the measure; items without verdict left out.

    A benchmark that puts one request into every category has each measure once a category.
    """
    rows = scores.to_pylist()
    found: dict[tuple[str, str], dict[str, float]] = {}
    for benchmark, measure, value in _MEASURES:
        parts: dict[str, dict[str, float]] = {}
        for row in rows:
            known = value(row) if row["benchmark"] == benchmark else None
            if known is not None:
                part = f", {row['category']}" if benchmark in _ASKED_AGAIN else ""
                parts.setdefault(part, {})[row["item_id"]] = known
        found |= {(benchmark, measure + part): values for part, values in sorted(parts.items())}
    return found


def item_clusters(scores: pa.Table) -> dict[str, str]:
    """Item id -> what it asks about, see `Item.cluster`."""
    rows = scores.select(["item_id", "cluster"]).to_pylist()
    return dict(zip(scores["item_id"].to_pylist(), clusters(rows), strict=True))


def p_value(p: float) -> str:
    """How it is written."""
    return f"{p:.2g}" if p >= 0.001 else "<0.001"


def paired_difference(
    first: Sequence[float], second: Sequence[float], of: Sequence[str] = ()
) -> dict[str, Any]:
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
    return {
        "n": len(a),
        "first": float(a.mean()),
        "second": float(b.mean()),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p": float(p),
        "test": test,
    }


def _mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(np.mean(a - b, axis=axis))


def compare_all(scores: dict[str, pa.Table]) -> list[dict[str, Any]]:
    """`compare` for every two models, in the order given."""
    return [
        {"models": [first, second], **row}
        for first, second in combinations(scores, 2)
        for row in compare(scores[first], scores[second])
    ]


def difference_table(rows: Sequence[dict[str, Any]]) -> Table:
    """`compare_all` for the terminal, in percent."""
    from rich.table import Table
    from rich.text import Text

    caption = (
        f"percent; same prompts, paired ({CONFIDENCE_LEVEL:.0%} bootstrap interval; p exact McNemar or "
        f"permutation, of {len(rows)} tests)"
    )
    table = Table(caption=caption)
    for column in ("", "models", "n", "from", "to", "difference", "p"):
        table.add_column(column, justify="left" if column in ("", "models") else "right")
    for row in rows:
        bounds = "" if row["low"] is None else f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        cells = (
            f"{row['benchmark']} {row['measure']}",
            " → ".join(row["models"]),
            str(row["n"]),
            f"{100 * row['first']:.1f}",
            f"{100 * row['second']:.1f}",
            f"{100 * row['difference']:+.1f}{bounds}",
            p_value(row["p"]),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table
