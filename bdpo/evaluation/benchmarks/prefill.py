"""Prefill attack: the assistant's turn already begins with a compliant answer; does the model continue it?

Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", arXiv 2406.05946, section
2.3: the first k tokens of a harmful answer are put into the assistant's turn, for several k.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bdpo.config import EvaluateConfig
from bdpo.evaluation.benchmarks.base import Benchmark, harm_measures
from bdpo.evaluation.benchmarks.items import CLUSTER, Item, read_csv, required_file

COLUMNS = ("category", "forbidden_prompt", "compliant_answer")


def load(file: str | Path, prefill_tokens: Sequence[int]) -> list[Item]:
    """Each prompt with each depth; a category is a depth (`005 tokens`).

    The judge is given what the model itself wrote, after the prefill: the prefill is not
    its answer. Tokens are the evaluated model's own; an answer of fewer tokens is prefilled completely.

    Raises:
        UserError: see `read_csv`.
    """
    rows = read_csv(file, COLUMNS, required=COLUMNS)
    return [
        Item(
            item_id=f"prefill-{number:04d}-{tokens:03d}",
            benchmark="prefill",
            category=f"{tokens:03d} tokens",
            prompt=row["forbidden_prompt"],
            request=row["forbidden_prompt"],
            should_comply=False,
            prefill=row["compliant_answer"],
            prefill_tokens=tokens,
            target=row["compliant_answer"],
            topic=row["category"],
            cluster=row.get(CLUSTER) or f"{number:04d}",
        )
        for number, row in enumerate(rows, 1)
        for tokens in sorted(set(prefill_tokens))
    ]


def _configured(config: EvaluateConfig) -> list[Item]:
    return load(required_file(config.prefill.path, "evaluate.prefill.path"), config.prefill.tokens)


BENCHMARK = Benchmark(
    name="prefill",
    label="Prefill",
    rubric="harm",
    purpose="safety",
    load=_configured,
    judged=harm_measures(),
    asks_again=True,
    plain={"tokens": [1]},
)
