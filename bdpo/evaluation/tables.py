"""Tables of evaluated models: for the terminal, and as rows for reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdpo.config import Config
from bdpo.evaluation.benchmarks.base import ACCURACY, Measure
from bdpo.evaluation.benchmarks.registry import BENCHMARKS, measure_label
from bdpo.evaluation.compare import Comparison
from bdpo.evaluation.judges.registry import JUDGES, NOBODY, JudgeNote, judge_kind
from bdpo.evaluation.measures import BenchmarkSummary, Summary
from bdpo.stats import (
    CONFIDENCE_LEVEL,
    Difference,
    Estimate,
    p_value,
    percent_of,
    points,
    points_of,
    widen,
)

if TYPE_CHECKING:
    from rich.table import Table


def difference_table(rows: Sequence[Comparison], judge: JudgeNote = NOBODY) -> Table:
    """`compare_all` for the terminal, in percent; a last column where the judge's own error is known."""
    from rich.table import Table
    from rich.text import Text

    caption = (
        f"percent; same prompts, paired ({CONFIDENCE_LEVEL:.0%} interval; p exact McNemar or "
        f"permutation, of {len(rows)} tests){judged_by(judge)}"
    )
    table = Table(caption=caption)
    own_error = ("with the judge's error",) if judge.reach else ()
    for column in ("", "models", "n", "from", "to", "difference", "p", *own_error):
        table.add_column(column, justify="left" if column in ("", "models") else "right")
    for row in rows:
        found = row.difference
        cells = (
            measure_label(row.benchmark, row.measure),
            " → ".join(row.models),
            str(found.n),
            f"{100 * found.first:.1f}",
            f"{100 * found.second:.1f}",
            points_of(found.difference, found.low, found.high),
            p_value(found.p),
            *([_with_error(row, judge)] if judge.reach else []),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _with_error(row: Comparison, judge: JudgeNote) -> str:
    reach = judge.reach.get(BENCHMARKS[row.benchmark].rubric)
    return "not measured" if reach is None else with_judge_error(row.difference, reach)


def with_judge_error(found: Difference, reach: float) -> str:
    """The interval of a difference with the judge's own error between two models in it, in points, and
    whether the difference is too small for the judge: the interval holds 0."""
    low, high = widen(found.difference, (found.low, found.high), reach)
    doubt = ", too small for this judge" if low <= 0 <= high else ""
    return f"{points(low)} to {points(high)}{doubt}"


def screen_warning(config: Config) -> str | None:
    """What is wrong with judging forbidden requests by phrases; None where that is not done."""
    judge = judge_kind(config)
    asked = {BENCHMARKS[name].rubric for name in config.evaluate.benchmarks}
    if "harm" not in asked & judge.screens:
        return None
    *others, last = (
        name
        for name, kind in JUDGES.items()
        if "harm" in kind.rubrics - kind.screens and not kind.sandbox_only
    )
    return (
        f"evaluate.judge.name={judge.name} is a screen: it looks for phrases of refusal and cannot tell "
        "whether an answer helps; its error between two models is in docs/judges.md. Choose "
        f"{', '.join(others)} or {last} for numbers to decide by"
    )


def judged_by(judge: JudgeNote) -> str:
    """The end of a caption: the judge, and its own error between two models, if it was measured."""
    if not judge.name:
        return ""
    errors = ", ".join(f"{rubric} ±{100 * reach:.0f}" for rubric, reach in judge.reach.items())
    own = f", points: {errors}" if errors else " not measured"
    exact = judge.name in JUDGES and JUDGES[judge.name].sandbox_only
    return f"; judged by {judge.label}" + ("" if exact else f" (own error between two models{own})")


@dataclass(frozen=True)
class ComparisonRow:
    """A row of a table that sets models side by side."""

    measure: str
    """Its label, as `StrongReject safety`."""
    category: str
    """Empty of the total."""
    n: str
    """Items scored: one number where the models agree, else `12 / 11`."""
    cells: Sequence[str]
    """For each model `value (low–high)` in percent; `invalid` where too many verdicts failed, `not run` where
    the data were unavailable, empty where there is no such number."""


def comparison_rows(summaries: Sequence[Summary]) -> list[ComparisonRow]:
    """The models of these summaries side by side: each measure over all items, then per category."""
    rows: list[ComparisonRow] = []
    for benchmark in BENCHMARKS.values():
        parts = [summary.benchmarks.get(benchmark.name) for summary in summaries]
        for measure in benchmark.measures:
            if measure.rows is not None:
                rows += _measure_rows(measure_label(benchmark.name, measure.name), parts, measure)
    return rows + _capability_rows(summaries)


def _measure_rows(
    label: str, parts: Sequence[BenchmarkSummary | None], measure: Measure
) -> Iterator[ComparisonRow]:
    """One measure of every model: the total, then its categories where the measure shows them."""
    names = {category for part in parts if part for category in part.categories}
    for category in ["", *(sorted(names) if measure.rows == "categories" else ())]:
        found = [_estimate(part, category, measure.name) for part in parts]
        cells = [_cell(part, estimate) for part, estimate in zip(parts, found, strict=True)]
        counts = [str(one.n) for one, cell in zip(found, cells, strict=True) if one and cell]
        if counts:
            n = " / ".join(counts if len(set(counts)) > 1 else counts[:1])
            yield ComparisonRow(label, category, n, cells)


def _estimate(part: BenchmarkSummary | None, category: str, measure: str) -> Estimate | None:
    """A model's estimate of a category, or of the total; None where the model was not asked."""
    if part is None or (category and category not in part.categories):
        return None
    return (part.categories[category] if category else part.total).estimates.get(measure)


def _capability_rows(summaries: Sequence[Summary]) -> list[ComparisonRow]:
    rows = []
    for benchmark in sorted({benchmark for summary in summaries for benchmark in summary.capability}):
        found = [summary.accuracy(benchmark) for summary in summaries]
        cells = [
            percent(accuracy) if accuracy else "not run" if benchmark in summary.capability else ""
            for accuracy, summary in zip(found, summaries, strict=True)
        ]
        counts = sorted({str(accuracy.n) for accuracy in found if accuracy})
        rows.append(ComparisonRow(measure_label(benchmark, ACCURACY.name), "", " / ".join(counts), cells))
    return rows


def invalid_lines(name: str, summary: Summary) -> list[str]:
    """For each invalid benchmark of a model a line: how many verdicts are missing, and why."""
    parts = summary.benchmarks.items()
    return [f"{name}: {why_invalid(benchmark, part)}" for benchmark, part in parts if not part.valid]


def why_invalid(benchmark: str, part: BenchmarkSummary) -> str:
    """Why an invalid benchmark has no number: nothing of it was asked, or too many verdicts are missing."""
    total = part.total
    if not total.asked:
        return f"{benchmark} is invalid, none of its {total.n} requests has an attack"
    return f"{benchmark} is invalid, {total.failed} of {total.asked} unjudged ({counts_text(total.failures)})"


def counts_text(counts: Mapping[str, int]) -> str:
    """`12 too_long, 3 timeout`, the most frequent first; empty where nothing was counted."""
    return ", ".join(f"{count} {name}" for name, count in Counter(counts).most_common())


def note_lines(name: str, summary: Summary) -> list[str]:
    """For each benchmark of a model what its numbers leave out or should be read with; none if nothing."""
    lines = []
    for benchmark, part in summary.benchmarks.items():
        total = part.total
        notes = [f"{total.not_asked} of {total.n} not asked (no attack)"] if total.not_asked else []
        if total.failed and part.valid:
            notes.append(
                f"{total.failed} of {total.asked} unjudged and in no number ({counts_text(total.failures)})"
            )
        notes += [f"{total.flagged} seem to address their judge"] if total.flagged else []
        notes += [f"{total.cut} cut at evaluate.max_new_tokens"] if total.cut else []
        if total.broken:
            notes.append(f"{sum(total.broken.values())} broken ({counts_text(total.broken)})")
        twins = summary.near_twins.get(benchmark)
        notes += [f"{twins} prompts nearly repeat prompts of training pairs"] if twins else []
        if notes:
            lines.append(f"{name}: {benchmark}: {'; '.join(notes)}")
    return lines


_LABEL_WIDTH = 26


def _cell(benchmark: BenchmarkSummary | None, estimate: Estimate | None) -> str:
    if benchmark is None or estimate is None:
        return ""
    return percent(estimate) if benchmark.valid else "invalid"


def percent(estimate: Estimate) -> str:
    """An estimate in percent with its interval; empty where nothing was measured."""
    return percent_of(estimate.value, estimate.low, estimate.high)


def comparison_table(summaries: Mapping[str, Summary], judge: JudgeNote = NOBODY) -> Table:
    """`comparison_rows` as a table for the terminal: one column a model, in the order given."""
    from rich.table import Table
    from rich.text import Text

    interval = f"{CONFIDENCE_LEVEL:.0%} interval, over clusters of items where there are any"
    table = Table(caption=f"percent ({interval}); n: items scored{judged_by(judge)}")
    # Three models do not fit 80 columns: labels keep their width, and an interval stands below its number.
    crowded = len(summaries) > 2
    table.add_column("", width=_LABEL_WIDTH if crowded else None, overflow="fold")
    for column in ("n", *summaries):
        table.add_column(Text(column), justify="right", no_wrap=not crowded, overflow="fold")
    for row in comparison_rows(list(summaries.values())):
        if not row.category:
            table.add_section()
        label = f"  {row.category}" if row.category else row.measure
        table.add_row(*(Text(cell) for cell in (label, row.n, *row.cells)))
    return table
