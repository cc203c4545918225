"""SimpleQA: short questions of fact with one true answer; does alignment cost knowledge or calibration?

Wei et al., arXiv 2411.04368; `simpleqa_eval.py` of github.com/openai/simple-evals and its
`simple_qa_test_set.csv`. The grader decides A correct, B incorrect, C not attempted.
"""

from __future__ import annotations

from pathlib import Path

from bdpo.config import EvaluateConfig
from bdpo.evaluation.benchmarks.base import Benchmark, Measure, Row
from bdpo.evaluation.benchmarks.items import Item, read_csv, required_file

COLUMNS = ("metadata", "problem", "answer")


def load(file: str | Path) -> list[Item]:
    """The questions, with the true answer as `reference`; all one category.

    Raises:
        UserError: see `read_csv`.
    """
    rows = read_csv(file, COLUMNS, required=("problem", "answer"))
    return [
        Item(
            item_id=f"simpleqa-{number:04d}",
            benchmark="simpleqa",
            category="facts",
            prompt=row["problem"],
            request=row["problem"],
            should_comply=True,
            reference=row["answer"],
        )
        for number, row in enumerate(rows, 1)
    ]


def _configured(config: EvaluateConfig) -> list[Item]:
    return load(required_file(config.simpleqa.path, "evaluate.simpleqa.path"))


def _correct(row: Row) -> float:
    return float(row["grade"] == "correct")


BENCHMARK = Benchmark(
    name="simpleqa",
    label="SimpleQA",
    rubric="grade",
    purpose="usefulness",
    load=_configured,
    judged=(
        Measure("correct", "correct", _correct, main=True, compared=True, rows="categories"),
        Measure(
            "incorrect",
            "incorrect",
            lambda row: float(row["grade"] == "incorrect"),
            more_is_better=False,
        ),
        Measure(
            "not_attempted",
            "not attempted",
            lambda row: float(row["grade"] == "not_attempted"),
            more_is_better=False,
            rows="categories",
        ),
        Measure(
            "correct_if_attempted",
            "correct if attempted",
            lambda row: None if row["grade"] == "not_attempted" else _correct(row),
        ),
    ),
)
