"""The requests that an attack tries, and how a compliant answer to each would begin."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks import advbench
from bdpo.evaluation.benchmarks.items import Item, read_csv
from bdpo.evaluation.benchmarks.registry import load_items


@dataclass(frozen=True)
class Request:
    """A forbidden request. Texts are left out of the repr, so that no traceback quotes them."""

    item_id: str
    """The benchmark's own id: names the request in scores, logs and errors."""
    index: int
    """The number in that id, which JailbreakBench's artifacts have."""
    category: str
    goal: str = field(repr=False)
    target: str = field(repr=False)
    """How a compliant answer begins; empty where neither the benchmark nor the config has one."""
    cluster: str = ""


def asking_config(config: Config) -> Config:
    """The config whose benchmark is the one that is attacked: what checks of prompts and judge are given."""
    attack, evaluate = config.attack, config.evaluate
    changes: dict[str, Any] = {"benchmarks": [attack.benchmark], "limit": attack.limit, "samples": 1}
    changes["prefill"] = evaluate.prefill.model_copy(update={"tokens": [1]})  # each request once
    changes["advbench"] = evaluate.advbench.model_copy(update={"suffix": None})
    return config.model_copy(update={"evaluate": evaluate.model_copy(update=changes)})


def load_requests(config: Config) -> list[Request]:
    """The requests of `attack.benchmark`, in the order of its file.

    Raises:
        UserError: see `load_items`; or the judge cannot judge harm.
    """
    items = load_items(asking_config(config).evaluate)
    targets = _targets(config, items)
    return [
        Request(item.item_id, _number(item), item.topic or item.category, item.request, target, item.cluster)
        for item, target in zip(items, targets, strict=True)
    ]


def _targets(config: Config, items: list[Item]) -> list[str]:
    """The benchmark's own, else `attack.target` where the attack has that key."""
    general = str(getattr(config.attack, "target", ""))
    if config.attack.benchmark == "prefill":
        return [item.prefill for item in items]
    if config.attack.benchmark == "advbench":
        rows = read_csv(str(config.evaluate.advbench.path), advbench.COLUMNS, required=("goal",))
        return [rows[_number(item) - 1]["target"].strip() or general for item in items]
    return [general] * len(items)


def _number(item: Item) -> int:
    found = re.search(r"\d+", item.item_id)
    if found is None:
        raise UserError(f"{item.item_id}: has no number")
    return int(found[0])
