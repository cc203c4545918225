"""Over-refusal: safe prompts of any set, which a model should answer.

For CoCoNot's contrasts (Brahman et al., arXiv 2407.12043, `coconot_contrast`), OR-Bench (Cui et al., arXiv
2405.20947) and sets of one's own: the config names the columns of the file that are read.
"""

from __future__ import annotations

from bdpo.config import EvaluateConfig
from bdpo.config.evaluate import OverRefusalConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.base import Benchmark, compliance_measures
from bdpo.evaluation.benchmarks.items import Item, read_columns, required_file


def load(own: OverRefusalConfig) -> list[Item]:
    """The prompts; an id is the cell of the column `id`, without one the number of the row, from 1.

    Raises:
        UserError: the file has no such column, an id appears twice, and see `read_columns`.
    """
    file = required_file(own.path, "evaluate.over_refusal.path")
    named = {"prompt": own.prompt, "category": own.category, "id": own.id, "cluster": own.cluster}
    items: dict[str, Item] = {}
    rows = read_columns(file, [column for column in named.values() if column])
    for number, row in enumerate(rows, 1):
        cells = {name: row[column] for name, column in named.items() if column}
        item_id = f"over_refusal-{cells.get('id', f'{number:04d}')}"
        if item_id in items:
            raise UserError(f"{file}, row {number}, column {own.id}: appears twice")
        items[item_id] = Item(
            item_id=item_id,
            benchmark="over_refusal",
            category=cells.get("category", "safe prompts"),
            prompt=cells["prompt"],
            request=cells["prompt"],
            should_comply=True,
            cluster=cells.get("cluster", ""),
        )
    return list(items.values())


def _configured(config: EvaluateConfig) -> list[Item]:
    return load(config.over_refusal)


BENCHMARK = Benchmark(
    "over_refusal", "Over-refusal", "refusal", "usefulness", _configured, compliance_measures()
)
