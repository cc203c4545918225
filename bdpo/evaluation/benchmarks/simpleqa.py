"""SimpleQA: short questions of fact with one true answer; does alignment cost knowledge or calibration?

Wei et al., arXiv 2411.04368; `simpleqa_eval.py` of github.com/openai/simple-evals and its
`simple_qa_test_set.csv`. The grader decides A correct, B incorrect, C not attempted.
"""

from __future__ import annotations

from pathlib import Path

from bdpo.evaluation.benchmarks.items import Item, read_csv

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
