"""XSTest: safe prompts that look unsafe, which a model should answer, and unsafe contrasts to them.

Röttger et al., "XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours in Large Language
Models", arXiv 2308.01263; the data is `xstest_prompts.csv` of github.com/paul-rottger/xstest (250 safe
prompts of 10 types, 200 unsafe contrasts of 8).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bdpo.config import EvaluateConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.base import Benchmark, Measure, compliance_measures, share
from bdpo.evaluation.benchmarks.items import CLUSTER, Item, read_csv, required_file

COLUMNS = ("id", "prompt", "type", "label", "focus", "note")

CONTRAST = "contrast_"

PER_TYPE = 25

TYPES = frozenset(
    {
        "homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions",
        "nons_group_real_discr", "real_group_nons_discr", "historical_events", "privacy_public",
        "privacy_fictional",
        *(CONTRAST + kind for kind in (
            "homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "discr",
            "historical_events", "privacy",
        )),
    }
)  # fmt: skip


def load(file: str | Path) -> list[Item]:
    """The prompts; a category is a `type`, and the label `safe` means that the model should comply.

    A file with any of XSTest's 18 types is XSTest, and must have 25 prompts of each and no others: a part
    of it would give numbers that nobody can compare. A file with none of them is another set of prompts in
    XSTest's format, of whatever size. In both a type is `contrast_…` exactly where the label is `unsafe`.

    Raises:
        UserError: a label is not the type's, an id appears twice, a count is not XSTest's, and see
            `read_csv`.
    """
    items: dict[str, Item] = {}
    rows = read_csv(file, COLUMNS, required=("id", "prompt", "type", "label"))
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("safe", "unsafe"):
            raise UserError(f"{file}, row {number}, column label: expects safe or unsafe")
        if row["type"].startswith(CONTRAST) != (row["label"] == "unsafe"):
            raise UserError(f"{file}, row {number}, column label: expects unsafe just for {CONTRAST}… types")
        item_id = f"xstest-{row['id']}"
        if item_id in items:
            raise UserError(f"{file}, row {number}, column id: appears twice")
        items[item_id] = Item(
            item_id=item_id,
            benchmark="xstest",
            category=row["type"],
            prompt=row["prompt"],
            request=row["prompt"],
            should_comply=row["label"] == "safe",
            cluster=row.get(CLUSTER, ""),
        )
    _check_counts(file, Counter(item.category for item in items.values()))
    return list(items.values())


def _check_counts(file: str | Path, counts: Counter[str]) -> None:
    if not TYPES & counts.keys():
        return
    for kind in sorted(TYPES | counts.keys()):
        expected = PER_TYPE if kind in TYPES else 0
        if counts[kind] != expected:
            raise UserError(
                f"{file}: XSTest has {expected} prompts of type {kind}, the file has {counts[kind]}"
            )


def _configured(config: EvaluateConfig) -> list[Item]:
    return load(required_file(config.xstest.path, "evaluate.xstest.path"))


BENCHMARK = Benchmark(
    name="xstest",
    label="XSTest",
    rubric="refusal",
    purpose="usefulness",
    load=_configured,
    judged=(
        *compliance_measures(", safe"),
        Measure(
            "unsafe_refusal",
            "refusal, unsafe",
            share("refused", False),
            compared=True,
            rows="categories",
        ),
        Measure(
            "unsafe_partial_refusal",
            "partial refusal, unsafe",
            share("partial", False),
            more_is_better=False,
        ),
    ),
)
