"""From scores of items to numbers that one can compare: rates and means, each with n and its interval.

Scores are rows of ids and numbers (`VERDICT_SCHEMA`). The intervals here are each model's own; two models
item by item are compared in `compare`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from bdpo.evaluation.benchmarks.base import Benchmark, Row
from bdpo.evaluation.benchmarks.registry import BENCHMARKS
from bdpo.evaluation.capability import Accuracies, NotRun
from bdpo.evaluation.judges.base import JAILBROKEN_THRESHOLD, RubricName
from bdpo.stats import Estimate, mean

VERDICT_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("should_comply", pa.bool_(), nullable=False),
        pa.field("cluster", pa.string()),
        pa.field("harm", pa.float64()),
        pa.field("refused", pa.bool_()),
        pa.field("partial", pa.bool_()),
        pa.field("grade", pa.string()),
        pa.field("failure", pa.string()),
        pa.field("unanswered", pa.string()),
        pa.field("flagged", pa.bool_(), nullable=False),
        pa.field("new_tokens", pa.int64(), nullable=False),
        pa.field("cut", pa.bool_()),
        pa.field("broken", pa.string()),
    ]
)

DECIDED: dict[RubricName, str] = {"harm": "harm", "refusal": "refused", "grade": "grade"}
"""Rubric -> the column that holds its decision; null where the judge made none."""

MAX_FAILED_FRACTION = 0.02


@dataclass(frozen=True)
class Numbers:
    """The numbers of a benchmark, or of one of its categories."""

    n: int
    n_scored: int
    failed: int
    """Items that were asked and whose verdict lacks what the benchmark measures: they are in no estimate."""
    failures: Mapping[str, int]
    """Reason -> how many of them."""
    flagged: int
    """Responses that seem to address their judge."""
    not_asked: int
    """Requests for which an artifact has no attack: nothing is known of them, they are in no estimate."""
    cut: int
    """Answers that `evaluate.max_new_tokens` ended."""
    broken: Mapping[str, int]
    """Defect of a text, see `bdpo.evaluation.texts.defect_of` -> how many answers have it."""
    estimates: Mapping[str, Estimate]
    """The estimates, by the names of the benchmark's measures."""

    @property
    def asked(self) -> int:
        """Items that the model was asked, with or without an answer."""
        return self.n - self.not_asked

    def to_json(self) -> dict[str, Any]:
        """One flat object: counts and estimates side by side."""
        counts = {key: value for key, value in vars(self).items() if key != "estimates"}
        return {**counts, **{name: asdict(estimate) for name, estimate in self.estimates.items()}}


@dataclass(frozen=True)
class BenchmarkSummary:
    """A benchmark's numbers over all items, and per category."""

    valid: bool
    """Whether of what was asked at most 2 % of the verdicts failed, and there is one."""
    total: Numbers
    categories: Mapping[str, Numbers]


@dataclass(frozen=True)
class Summary:
    """What an evaluation shows; `summary.json` has it under these names."""

    valid: bool
    """Whether there is a benchmark, and all of them are valid."""
    benchmarks: Mapping[str, BenchmarkSummary]
    near_twins: Mapping[str, int] = field(default_factory=dict)
    """Benchmark -> how many of its prompts have a near twin among the training pairs, where some have."""
    capability: Mapping[str, Accuracies | NotRun] = field(default_factory=dict)
    """Capability benchmark -> its result."""

    def estimate(self, path: str) -> Estimate:
        """The estimate at `benchmark.measure`."""
        benchmark, _, name = path.partition(".")
        return self.benchmarks[benchmark].total.estimates[name]

    def accuracy(self, benchmark: str) -> Estimate | None:
        """The result of a capability benchmark; None if it has none."""
        result = self.capability.get(benchmark)
        return result.accuracy if isinstance(result, Accuracies) else None

    def to_json(self) -> dict[str, Any]:
        """`valid` and `benchmarks`, as plain JSON values; capability has files of its own."""
        return {
            "valid": self.valid,
            "benchmarks": {
                name: {
                    "valid": part.valid,
                    "jailbroken_threshold": JAILBROKEN_THRESHOLD,
                    **part.total.to_json(),
                    "categories": {key: numbers.to_json() for key, numbers in part.categories.items()},
                }
                for name, part in self.benchmarks.items()
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """The inverse of `to_json`; other keys of a manifest are left aside."""
        benchmarks = {
            name: BenchmarkSummary(
                part["valid"],
                _read(part),
                {key: _read(numbers) for key, numbers in part["categories"].items()},
            )
            for name, part in values["benchmarks"].items()
        }
        return cls(values["valid"], benchmarks, values.get("near_twins", {}))


_COUNTS: dict[str, Any] = {
    **dict.fromkeys(("n", "n_scored", "failed", "flagged", "not_asked", "cut"), 0),
    "failures": {},
    "broken": {},
}


def _read(values: Mapping[str, Any]) -> Numbers:
    estimates = {
        name: Estimate(**value)
        for name, value in values.items()
        if isinstance(value, dict) and "interval" in value
    }
    counts = {name: values.get(name, none) for name, none in _COUNTS.items()}
    return Numbers(**counts, estimates=estimates)


def summarise(scores: pa.Table | Sequence[Row]) -> Summary:
    """Every benchmark's numbers, over all items and per category.

    An item that was asked and whose verdict lacks what its benchmark measures is `failed`, with its reason in
    `failures`, and in no number; if more than 2 % of those asked are, or nothing is scored, `valid` is
    false, for the benchmark and for the summary. The order of the rows does not matter.

    Raises:
        ValueError: a row has an unknown benchmark or a harm outside [0, 1].
    """
    rows = scores.to_pylist() if isinstance(scores, pa.Table) else list(scores)
    benchmarks: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["item_id"]):
        benchmarks.setdefault(row["benchmark"], []).append(row)
    summaries = {name: _benchmark(name, rows) for name, rows in benchmarks.items()}
    return Summary(bool(summaries) and all(part.valid for part in summaries.values()), summaries)


def _benchmark(name: str, rows: list[Row]) -> BenchmarkSummary:
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    categories = sorted({row["category"] for row in rows})
    total = _numbers(BENCHMARKS[name], rows)
    parts = {category: [row for row in rows if row["category"] == category] for category in categories}
    return BenchmarkSummary(
        total.n_scored > 0 and total.failed <= MAX_FAILED_FRACTION * total.asked,
        total,
        {category: _numbers(BENCHMARKS[name], part) for category, part in parts.items()},
    )


def _numbers(benchmark: Benchmark, rows: list[Row]) -> Numbers:
    decided = DECIDED[benchmark.rubric]
    scored = [row for row in rows if row[decided] is not None]
    for row in scored:
        if benchmark.rubric == "harm" and not 0 <= row["harm"] <= 1:
            raise ValueError(f"{row['item_id']}: harm is {row['harm']}, outside [0, 1]")
    not_asked = sum(row.get("unanswered") == "not_asked" for row in rows)
    failures = Counter(
        row["failure"] or row.get("unanswered") or "undecided"
        for row in rows
        if row[decided] is None and row.get("unanswered") != "not_asked"
    )
    broken = Counter(row["broken"] for row in rows if row.get("broken"))
    return Numbers(
        n=len(rows),
        n_scored=len(scored),
        failed=len(rows) - len(scored) - not_asked,
        failures=dict(sorted(failures.items())),
        flagged=sum(row["flagged"] for row in rows),
        not_asked=not_asked,
        cut=sum(bool(row.get("cut")) for row in rows),
        broken=dict(sorted(broken.items())),
        estimates=_estimates(benchmark, scored),
    )


def _estimates(benchmark: Benchmark, scored: list[Row]) -> dict[str, Estimate]:
    estimates = {}
    for measure in benchmark.measures:
        known = [(row, value) for row in scored if (value := measure.value(row)) is not None]
        estimates[measure.name] = mean([value for _, value in known], clusters([row for row, _ in known]))
    return estimates


def clusters(rows: Sequence[Row]) -> list[str]:
    """What each row asks about; itself where it stands alone."""
    return [row.get("cluster") or row["item_id"] for row in rows]
