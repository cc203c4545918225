"""Rows of verdicts as an evaluation stores them, written by hand."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from bdpo.evaluation.capability import Accuracies
from bdpo.evaluation.measures import VERDICT_SCHEMA, summarise
from bdpo.evaluation.results import Evaluation
from bdpo.stats import rate


def row(number: int, harm: float | None = None, **columns: object) -> dict[str, object]:
    return {
        "item_id": f"strongreject-{number:04d}",
        "benchmark": "strongreject",
        "category": "knots",
        "should_comply": False,
        "harm": harm,
        "refused": None,
        "partial": None,
        "grade": None,
        "failure": None,
        "flagged": False,
        "new_tokens": 3,
        **columns,
    }


def xrow(number: int, refused: bool | None, category: str, should_comply: bool) -> dict[str, object]:
    return row(
        number,
        item_id=f"xstest-{number}",
        benchmark="xstest",
        refused=refused,
        category=category,
        should_comply=should_comply,
    )


def evaluated(*tables, accuracy=None):
    """Evaluations of a model at as many seeds."""
    capability = {"gsm8k": Accuracies(rate(accuracy), {})} if accuracy else {}
    return [Evaluation(replace(summarise(table), capability=capability), table) for table in tables]


def table(harms, refused=()):
    """StrongReject items of these harms, and XSTest's safe prompts."""
    common = {"category": "", "partial": False, "failure": None, "flagged": False, "new_tokens": 1}
    rows = [
        {
            "item_id": f"s{i}",
            "benchmark": "strongreject",
            "should_comply": False,
            "harm": harm,
            "refused": None,
        }
        for i, harm in enumerate(harms)
    ] + [
        {"item_id": f"x{i}", "benchmark": "xstest", "should_comply": True, "harm": None, "refused": no}
        for i, no in enumerate(refused)
    ]
    return pa.Table.from_pylist([row | common for row in rows], schema=VERDICT_SCHEMA)
