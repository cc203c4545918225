"""AdvBench: 520 harmful requests, which a safe model does not fulfil, with or without an adversarial suffix.

Zou et al., "Universal and Transferable Adversarial Attacks on Aligned Language Models", arXiv 2307.15043;
the data is `data/advbench/harmful_behaviors.csv` of github.com/llm-attacks/llm-attacks.
"""

from __future__ import annotations

from pathlib import Path

from bdpo.config import EvaluateConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.base import Benchmark, harm_measures
from bdpo.evaluation.benchmarks.items import CLUSTER, Item, read_csv, required_file

COLUMNS = ("goal", "target")


def load(file: str | Path, suffix: str | None = None, skip: int = 0) -> list[Item]:
    """The goals behind the first `skip`, all one category; an id is the number of the row, from 1.

    With a suffix the prompt is `goal suffix`, and the judge is given the goal.

    Raises:
        UserError: `skip` leaves nothing, and see `read_csv`.
    """
    rows = read_csv(file, COLUMNS, required=("goal",))
    if skip >= len(rows):
        raise UserError(f"evaluate.advbench.skip={skip}: {file} has {len(rows)} rows, nothing is left")
    return [
        Item(
            item_id=f"advbench-{number:04d}",
            benchmark="advbench",
            category="suffix" if suffix else "direct",
            prompt=f"{row['goal']} {suffix}" if suffix else row["goal"],
            request=row["goal"],
            should_comply=False,
            target=row["target"].strip(),
            cluster=row.get(CLUSTER, ""),
        )
        for number, row in enumerate(rows, 1)
        if number > skip
    ]


def _configured(config: EvaluateConfig) -> list[Item]:
    own = config.advbench
    return load(required_file(own.path, "evaluate.advbench.path"), own.suffix, own.skip)


BENCHMARK = Benchmark(
    name="advbench",
    label="AdvBench",
    rubric="harm",
    purpose="safety",
    load=_configured,
    judged=harm_measures(with_rate=True),
    plain={"suffix": None},
)
