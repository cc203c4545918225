"""All benchmarks by name, and the prompts of those that a run is configured with."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

from bdpo.config import EvaluateConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks import (
    jailbreak,
    prefill,
    simpleqa,
    strongreject,
    wrapped,
    xstest,
)
from bdpo.evaluation.benchmarks.download import pinned_file
from bdpo.evaluation.benchmarks.items import Item

__all__ = ["Item", "load_items"]


def load_items(config: EvaluateConfig) -> list[Item]:
    """The prompts of the configured benchmarks, in the order of their files.

    `evaluate.limit` is spread evenly over a benchmark's categories: the files are sorted by category, so
    their first rows would be a single one. No chance is involved, and an item's id does not depend on it.

    Raises:
        UserError: a benchmark has no file, its file is not what the benchmark wants, or nothing of it is in
            the part `evaluate.part`.
    """
    loaded: dict[str, list[Item]] = {
        benchmark: _LOADERS[benchmark](config) for benchmark in config.benchmarks
    }
    if config.part != "all":
        loaded = _part(loaded, config)
    return [item for items in loaded.values() for item in _spread(items, config.limit)]


def _strongreject(config: EvaluateConfig) -> list[Item]:
    file = pinned_file(_file(config, "strongreject_path"), config.strongreject_sha256)
    return strongreject.load(file, config.strongreject_subset)


def _jailbreak(config: EvaluateConfig) -> list[Item]:
    if not config.jailbreak_paths:
        raise UserError("key evaluate.jailbreak_paths is missing: benchmark jailbreak wants artifacts")
    return jailbreak.load(config.jailbreak_paths)


def _file(config: EvaluateConfig, key: str) -> str:
    file = getattr(config, key)
    if file is None:
        raise UserError(f"key evaluate.{key} is missing: a benchmark of evaluate.benchmarks wants its CSV")
    return str(file)


_LOADERS: dict[str, Callable[[EvaluateConfig], list[Item]]] = {
    "strongreject": _strongreject,
    "xstest": lambda config: xstest.load(_file(config, "xstest_path")),
    "jailbreak": _jailbreak,
    "prefill": lambda config: prefill.load(_file(config, "prefill_path"), config.prefill_tokens),
    "wrapped": lambda config: wrapped.load(_strongreject(config), config.wrappers),
    "simpleqa": lambda config: simpleqa.load(_file(config, "simpleqa_path")),
}


def _part(loaded: dict[str, list[Item]], config: EvaluateConfig) -> dict[str, list[Item]]:
    """The items of `evaluate.part`; a request is on one side in every benchmark that asks it."""
    held_out, wanted = config.held_out, config.part == "held_out"
    categories = {item.category for items in loaded.values() for item in items}
    if isinstance(held_out, list) and not categories.issuperset(held_out):
        unknown = next(name for name in held_out if name not in categories)
        raise UserError(
            f"evaluate.held_out: no category {unknown}; there are {', '.join(sorted(categories))}"
        )
    parts = {}
    for benchmark, items in loaded.items():
        parts[benchmark] = [
            item
            for item in items
            if wanted == (item.category in held_out if isinstance(held_out, list) else _draw(item) < held_out)
        ]
        if not parts[benchmark]:
            raise UserError(f"evaluate.held_out={held_out}: leaves no prompt of {benchmark} to {config.part}")
    return parts


def _draw(item: Item) -> float:
    """A number in [0, 1) that is the request's own: no chance, and the same whatever else is asked."""
    return int.from_bytes(hashlib.sha256(item.request.encode()).digest()[:6]) / 2**48


def _spread(items: list[Item], limit: int | None) -> list[Item]:
    """The first of each category, then the second of each, and so on up to `limit`; in file order."""
    seen: Counter[str] = Counter()
    rounds = []
    for item in items:
        rounds.append(seen[item.category])
        seen[item.category] += 1
    taken = sorted(range(len(items)), key=rounds.__getitem__)[:limit]
    return [items[i] for i in sorted(taken)]
