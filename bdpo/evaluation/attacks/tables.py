"""An attack's numbers for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from bdpo.evaluation.attacks.results import AttackSummary
from bdpo.evaluation.judges.registry import NOBODY, JudgeNote
from bdpo.evaluation.tables import counts_text, judged_by, percent, with_judge_error
from bdpo.stats import CONFIDENCE_LEVEL, Difference, Estimate, p_value, points

if TYPE_CHECKING:
    from rich.table import Table


def attack_table(label: str, summaries: Mapping[str, AttackSummary], judge: JudgeNote) -> Table:
    """One column a model: success over all requests and by category, then what it took."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        caption=f"{label}: percent ({CONFIDENCE_LEVEL:.0%} interval over requests){judged_by(judge)}; "
        "a lower bound: other attacks, seeds and budgets may succeed"
    )
    table.add_column("")
    for name in summaries:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for row, cells in _rows(summaries):
        table.add_row(*(Text(cell) for cell in (row, *cells)))
    return table


def _rows(summaries: Mapping[str, AttackSummary]) -> Iterator[tuple[str, list[str]]]:
    found = list(summaries.values())
    yield "attack success", [_rate(summary, summary.success) for summary in found]
    if any(summary.direct for summary in found):
        yield "  direct request alone", [_rate(summary, summary.direct) for summary in found]
        yield "  requests withstood alone", [_rate(summary, summary.beyond_direct) for summary in found]
    if any(summary.held_out for summary in found):
        yield "  held-out requests", [_rate(summary, summary.held_out) for summary in found]
        yield "  requests of the suffix", [_rate(summary, summary.trained_on) for summary in found]
    for category in sorted({name for summary in found for name in summary.categories}):
        yield f"  {category}", [_rate(summary, summary.categories.get(category)) for summary in found]
    yield "requests with a verdict", [f"{summary.n_judged} of {summary.n}" for summary in found]
    yield "not asked or answered", [counts_text(summary.unanswered) or "0" for summary in found]
    yield "judge or attacker failed", [counts_text(summary.failures) or "0" for summary in found]
    yield "answers without a verdict", [f"{summary.failed_verdicts:,}" for summary in found]
    if any(summary.failed_prompts for summary in found):
        yield "prompts that failed", [f"{summary.failed_prompts:,}" for summary in found]
    if any(summary.not_asked for summary in found):
        yield "prompts without room", [f"{summary.not_asked:,}" for summary in found]
    if any(summary.stuck for summary in found):
        yield "searches without candidates", [f"{summary.stuck:,}" for summary in found]
    yield "queries", [f"{summary.queries:,}" for summary in found]
    yield "  median of a success", [_median(summary.median_queries) for summary in found]
    yield "other forward passes", [f"{summary.forward_passes:,}" for summary in found]
    if any(summary.median_forward_passes is not None for summary in found):
        yield "  median of a success", [_median(summary.median_forward_passes) for summary in found]
    yield "tokens in, out", [f"{summary.prompt_tokens:,}, {summary.response_tokens:,}" for summary in found]


def _rate(summary: AttackSummary, estimate: Estimate | None) -> str:
    """A rate of an attack; where too few requests have a verdict none of its rates is shown."""
    if estimate is None:
        return ""
    return f"{percent(estimate)} n={estimate.n}" if summary.valid else "invalid"


def _median(value: float | None) -> str:
    return "" if value is None else f"{value:,g}"


def difference_line(difference: Difference, judge: JudgeNote = NOBODY) -> str:
    """The paired comparison in a line, with the judge's own error where it is known."""
    low, high, reach = points(difference.low), points(difference.high), judge.reach.get("harm")
    own = "" if reach is None else f"; with the judge's own error {with_judge_error(difference, reach)}"
    return (
        f"attack success, base → trained: {100 * difference.first:.1f} → {100 * difference.second:.1f}, "
        f"{points(difference.difference)} points ({low} to {high}), "
        f"p {p_value(difference.p)} ({difference.test}), {difference.n} requests, paired{own}"
    )
