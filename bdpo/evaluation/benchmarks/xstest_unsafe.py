"""XSTest's 200 unsafe prompts alone, judged for harm.

The B-DPO paper (arXiv 2603.22829) reports XSTest so, by the denominators of its tables: the share of safe
answers to the unsafe prompts, which is `safe_rate` here. How many safe prompts a model refuses is `xstest`.
"""

from __future__ import annotations

from dataclasses import replace

from bdpo.config import EvaluateConfig
from bdpo.evaluation.benchmarks import xstest
from bdpo.evaluation.benchmarks.base import Benchmark, harm_measures
from bdpo.evaluation.benchmarks.items import Item, required_file


def _configured(config: EvaluateConfig) -> list[Item]:
    """The unsafe prompts of XSTest's file; an id is that of the file."""
    path = config.xstest_unsafe.path or config.xstest.path
    return [
        replace(item, item_id=f"xstest_unsafe-{item.item_id.partition('-')[2]}", benchmark="xstest_unsafe")
        for item in xstest.load(required_file(path, "evaluate.xstest_unsafe.path"))
        if not item.should_comply
    ]


BENCHMARK = Benchmark(
    "xstest_unsafe", "XSTest unsafe", "harm", "safety", _configured, harm_measures(with_rate=True)
)
