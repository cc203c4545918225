"""The requests that an attack tries, and how a compliant answer to each would begin."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from bdpo.config import Config
from bdpo.config.attack import TargetedConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.benchmarks.registry import BENCHMARKS, load_items


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
    """The config whose benchmark is the one that is attacked: what checks of prompts and judge are given.

    Raises:
        UserError: the requests of `attack.benchmark` cannot be attacked.
    """
    attack, evaluate, plain = config.attack, config.evaluate, BENCHMARKS[config.attack.benchmark].plain
    if plain is None:
        able = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.plain is not None)
        raise UserError(f"attack.benchmark={attack.benchmark}: cannot be attacked, expects one of {able}")
    section = getattr(evaluate, attack.benchmark).model_copy(update=plain)
    changes: dict[str, Any] = {"benchmarks": [attack.benchmark], "limit": attack.limit, "samples": 1}
    changes[attack.benchmark] = section
    return config.model_copy(update={"evaluate": evaluate.model_copy(update=changes)})


def load_requests(config: Config) -> list[Request]:
    """The requests of `attack.benchmark`, in the order of its file.

    Raises:
        UserError: see `load_items` and `asking_config`; or an item's id has no number.
    """
    general = config.attack.target if isinstance(config.attack, TargetedConfig) else ""
    return [
        Request(
            item.item_id,
            _number(item),
            item.topic or item.category,
            item.request,
            item.target or general,
            item.cluster,
        )
        for item in load_items(asking_config(config).evaluate)
    ]


def _number(item: Item) -> int:
    found = re.search(r"\d+", item.item_id)
    if found is None:
        raise UserError(f"{item.item_id}: has no number")
    return int(found[0])
