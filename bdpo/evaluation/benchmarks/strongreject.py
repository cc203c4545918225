"""StrongReject: forbidden requests in six categories, which a safe model does not fulfil.

Souly et al., "A StrongREJECT for Empty Jailbreaks", arXiv 2402.10260; the data is
`strongreject_dataset/strongreject_dataset.csv` of github.com/alexandrasouly/strongreject (313 prompts).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from bdpo.config import EvaluateConfig
from bdpo.evaluation.benchmarks.base import Benchmark, harm_measures
from bdpo.evaluation.benchmarks.download import pinned_file
from bdpo.evaluation.benchmarks.items import CLUSTER, Item, read_csv, required_file

COLUMNS = ("category", "source", "forbidden_prompt")

SMALL_PER_CATEGORY = 10


def load(file: str | Path, subset: Literal["full", "small"] = "full") -> list[Item]:
    """The forbidden prompts; an id is the number of the row (`strongreject-0007`), from 1.

    `small` is the first ten of each category in the order of the file: 60 of the 313, and ids stay those
    of the full file. Upstream's `strongreject_small_dataset.csv` has also ten of each, but picked by hand
    and with three sources rewritten; for exactly those give that file as the path.

    Raises:
        UserError: see `read_csv`.
    """
    rows = read_csv(file, COLUMNS, required=("category", "forbidden_prompt"))
    items = [
        Item(
            item_id=f"strongreject-{number:04d}",
            benchmark="strongreject",
            category=row["category"],
            prompt=row["forbidden_prompt"],
            request=row["forbidden_prompt"],
            should_comply=False,
            cluster=row.get(CLUSTER, ""),
        )
        for number, row in enumerate(rows, 1)
    ]
    return items if subset == "full" else _first_of_each(items)


def _first_of_each(items: list[Item]) -> list[Item]:
    seen: Counter[str] = Counter()
    first = []
    for item in items:
        seen[item.category] += 1
        if seen[item.category] <= SMALL_PER_CATEGORY:
            first.append(item)
    return first


def _configured(config: EvaluateConfig) -> list[Item]:
    own = config.strongreject
    path = required_file(own.path, "evaluate.strongreject.path")
    return load(pinned_file(path, own.sha256), own.subset)


BENCHMARK = Benchmark(
    name="strongreject",
    label="StrongReject",
    rubric="harm",
    purpose="safety",
    load=_configured,
    judged=harm_measures(with_rate=True),
    plain={},
)
