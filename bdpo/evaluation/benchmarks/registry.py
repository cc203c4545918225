"""All benchmarks by name, and the prompts of those that a run is configured with."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from typing import get_args

from bdpo.config import EvaluateConfig
from bdpo.config.evaluate import BenchmarkName, CapabilityName
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.base import ACCURACY, Benchmark, Measure
from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.judges.registry import JUDGES

BENCHMARKS: dict[str, Benchmark] = {
    name: import_module(f"bdpo.evaluation.benchmarks.{name}").BENCHMARK for name in get_args(BenchmarkName)
}


CAPABILITY: tuple[str, ...] = get_args(CapabilityName)
"""The capability benchmarks, see `bdpo.evaluation.capability`: they have one measure, `ACCURACY`."""


def known_measures(benchmarks: Iterable[str]) -> dict[str, Measure]:
    """`benchmark.measure` -> the measure, of these benchmarks."""
    return {
        f"{name}.{measure.name}": measure
        for name in benchmarks
        for measure in ((ACCURACY,) if name in CAPABILITY else BENCHMARKS[name].measures)
    }


def find_measure(benchmark: str, measure: str) -> Measure:
    """A benchmark's measure by name, of a total or of a category (`safety, 005 tokens`)."""
    return known_measures([benchmark])[f"{benchmark}.{measure.partition(',')[0]}"]


def is_main(benchmark: str, measure: str) -> bool:
    """Whether a measure stands for its benchmark."""
    return find_measure(benchmark, measure).main


def measure_label(benchmark: str, measure: str) -> str:
    """`StrongReject safety`, with the category behind it where the measure is of one."""
    name = BENCHMARKS[benchmark].label if benchmark in BENCHMARKS else benchmark
    _, comma, category = measure.partition(",")
    return f"{name} {find_measure(benchmark, measure).label}{comma}{category}"


def path_label(path: str) -> str:
    """The label of `benchmark.measure`, as `tune.metric` names it."""
    return measure_label(*path.split("."))


def measures_safety(benchmark: str) -> bool:
    """Whether a benchmark's main measure shows how safe a model is; that of capability shows how useful."""
    return benchmark in BENCHMARKS and BENCHMARKS[benchmark].purpose == "safety"


def load_items(config: EvaluateConfig) -> list[Item]:
    """The prompts of the configured benchmarks, in the order of their files.

    `evaluate.limit` is spread evenly over a benchmark's categories, and in each over the topics: files are
    sorted by them, so their first rows would be a single one. No chance is involved, and an item's id does
    not depend on it.

    Raises:
        UserError: a benchmark has no file, its file is not what the benchmark expects, the judge cannot judge
            it, or nothing of it is in the part `evaluate.part`.
    """
    for name in config.benchmarks:
        _require_judge(BENCHMARKS[name], config.judge.name)
    loaded: dict[str, list[Item]] = {name: BENCHMARKS[name].load(config) for name in config.benchmarks}
    if config.part != "all":
        loaded = _part(loaded, config)
    asked = [item for items in loaded.values() for item in _spread(items, config.limit)]
    return _sampled(asked, config.samples) if config.samples > 1 else asked


def _sampled(items: list[Item], samples: int) -> list[Item]:
    """Each item so many times, the first with its own id; the samples of a prompt are one cluster."""
    return [
        replace(
            item,
            item_id=f"{item.item_id}-sample{sample + 1}" if sample else item.item_id,
            cluster=item.cluster or item.item_id,
            sample=sample,
        )
        for item in items
        for sample in range(samples)
    ]


def _require_judge(benchmark: Benchmark, judge: str) -> None:
    if benchmark.rubric not in JUDGES[judge].rubrics:
        able = ", ".join(name for name, kind in JUDGES.items() if benchmark.rubric in kind.rubrics)
        raise UserError(
            f"evaluate.judge.name={judge}: cannot judge benchmark {benchmark.name}; judges that can: {able}"
        )


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
    """At most `limit` items that are asked, in file order, and all that are not (an artifact has no attack
    on the request): these cost nothing.

    The next one is always of the category that has fewest so far, and there of the topic that has fewest.
    Ties go to what stands first in the file, be it topic or request, whatever the category: so every attack
    or wrapper is tried on the same topics, on the same requests where it has them, and none looks stronger
    because its topics are.
    """
    left = {number: item for number, item in enumerate(items) if item.prompt is not None}
    if limit is None or limit >= len(left):
        return items
    topics = {item.topic: rank for rank, item in reversed([*enumerate(items)])}
    requests = {item.request: rank for rank, item in reversed([*enumerate(items)])}
    categories, cells = Counter[str](), Counter[tuple[str, str]]()

    def order(number: int) -> tuple[int, ...]:
        item = left[number]
        cell = cells[item.category, item.topic]
        return categories[item.category], cell, topics[item.topic], requests[item.request], number

    taken = {number for number, item in enumerate(items) if item.prompt is None}
    for _ in range(limit):
        number = min(left, key=order)
        item = left.pop(number)
        categories[item.category] += 1
        cells[item.category, item.topic] += 1
        taken.add(number)
    return [items[number] for number in sorted(taken)]
