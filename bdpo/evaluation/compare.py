"""Two models on the same prompts: the difference item by item, its interval, and a p-value.

Paired, because the same prompts are hard for both models: much smaller differences show than between two
intervals. Corrections for looking at many measures are left out; the table says how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pyarrow as pa

from bdpo.evaluation.measures import HARM_BENCHMARKS, JAILBROKEN_THRESHOLD, Row, clusters, complied
from bdpo.stats import paired_difference


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


def compare_all(scores: dict[str, pa.Table]) -> list[dict[str, Any]]:
    """`compare` for every two models, in the order given."""
    return [
        {"models": [first, second], **row}
        for first, second in combinations(scores, 2)
        for row in compare(scores[first], scores[second])
    ]
