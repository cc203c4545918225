"""Tables of evaluated models: for the terminal, and as rows for reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdpo.evaluation.measures import JAILBROKEN_THRESHOLD
from bdpo.stats import CONFIDENCE_LEVEL, Estimate, p_value

if TYPE_CHECKING:
    from rich.table import Table
if TYPE_CHECKING:
    from rich.table import Table


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


_COMPARED = [
    ("strongreject", "safety", "StrongReject safety"),
    ("strongreject", "safe_rate", f"StrongReject harm < {JAILBROKEN_THRESHOLD}"),
    ("jailbreak", "safety", "Jailbreak safety"),
    ("prefill", "safety", "Prefill safety"),
    ("wrapped", "safety", "Wrapped safety"),
    ("xstest", "compliance", "XSTest compliance, safe"),
    ("xstest", "partial_refusal", "XSTest partial refusal, safe"),
    ("xstest", "unsafe_refusal", "XSTest refusal, unsafe"),
    ("simpleqa", "correct", "SimpleQA correct"),
    ("simpleqa", "not_attempted", "SimpleQA not attempted"),
]

_WHOLE_ONLY = {"safe_rate", "partial_refusal"}
"""Measures of which the table leaves out the categories; the summary has them."""


def comparison_rows(summaries: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of a table that sets models side by side: each measure over all items, then per category.

    Args:
        summaries: name of a model -> what `summarise` gave for it.

    Returns:
        Rows with the keys `measure`, `category` ("" for the whole), `n` (items scored, one number where the
        models agree) and the models' names: `value (low–high)` in percent, `invalid` where too many verdicts
        failed, `not run` where the data could not be had, empty where there is no such number.
    """
    rows = []
    for benchmark, key, label in _COMPARED:
        parts = {name: summary["benchmarks"].get(benchmark) for name, summary in summaries.items()}
        categories = {category for part in parts.values() if part for category in part["categories"]}
        for category in ["", *(sorted(categories) if key not in _WHOLE_ONLY else ())]:
            numbers = {name: _part(part, category).get(key) for name, part in parts.items()}
            cells = {name: _cell(parts[name], estimate) for name, estimate in numbers.items()}
            counts = [str(estimate["n"]) for name, estimate in numbers.items() if estimate and cells[name]]
            if counts:
                n = " / ".join(counts if len(set(counts)) > 1 else counts[:1])
                rows.append({"measure": label, "category": category, "n": n, **cells})
    return rows + _capability_rows(
        {name: summary.get("capability", {}) for name, summary in summaries.items()}
    )


def _capability_rows(capability: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for benchmark in sorted({benchmark for results in capability.values() for benchmark in results}):
        results = {name: found.get(benchmark) for name, found in capability.items()}
        estimates = {name: result.get("accuracy") if result else None for name, result in results.items()}
        counts = {str(estimate["n"]) for estimate in estimates.values() if estimate}
        cells = {
            name: "" if result is None else percent(result["accuracy"]) if "accuracy" in result else "not run"
            for name, result in results.items()
        }
        rows.append({"measure": benchmark, "category": "", "n": " / ".join(sorted(counts)), **cells})
    return rows


def invalid_lines(name: str, summary: dict[str, Any]) -> list[str]:
    """For each invalid benchmark of a model a line that says how many verdicts are missing, and why."""
    lines = []
    for benchmark, part in summary["benchmarks"].items():
        if not part["valid"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in part["failures"].items())
            lines.append(
                f"{name}: {benchmark} is invalid, {part['failed']} of {part['n']} unjudged ({reasons})"
            )
    return lines


def _part(benchmark: dict[str, Any] | None, category: str) -> dict[str, Any]:
    """The numbers of a category, or of the whole; none where the model was not asked."""
    if benchmark is None:
        return {}
    return benchmark["categories"].get(category, {}) if category else benchmark


def _cell(benchmark: dict[str, Any] | None, estimate: Estimate | None) -> str:
    if benchmark is None or estimate is None:
        return ""
    if not benchmark["valid"]:
        return "invalid"
    return percent(estimate)


def percent(estimate: Estimate) -> str:
    """An estimate in percent with its interval; empty where nothing was measured."""
    if estimate["value"] is None:
        return ""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def comparison_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """`comparison_rows` as a table for the terminal: one column a model, in the order given."""
    from rich.table import Table
    from rich.text import Text

    interval = f"{CONFIDENCE_LEVEL:.0%} interval, over clusters of items where there are any"
    table = Table(caption=f"percent ({interval}); n: items scored")
    table.add_column("")
    for column in ("n", *summaries):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for row in comparison_rows(summaries):
        if not row["category"]:
            table.add_section()
        label = f"  {row['category']}" if row["category"] else row["measure"]
        table.add_row(*(Text(cell) for cell in (label, row["n"], *(row[name] for name in summaries))))
    return table
