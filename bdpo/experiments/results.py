"""The results of an experiment: a row for each arm and measure, a row for each difference, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from bdpo.evaluation.benchmarks.base import ACCURACY
from bdpo.evaluation.benchmarks.registry import is_main, measure_label
from bdpo.evaluation.compare import MeasureKey, item_clusters, item_values
from bdpo.evaluation.measures import Summary
from bdpo.evaluation.results import Evaluation
from bdpo.experiments.arms import Arm
from bdpo.experiments.experiment import Experiment, Finding
from bdpo.experiments.jobs import Job
from bdpo.experiments.rates import RateTrial
from bdpo.reports.cost import TimedStage
from bdpo.stats import Difference, Estimate, mean, paired_difference

BASE = "base"


@dataclass(frozen=True)
class ArmMeasure:
    """One measure of one arm."""

    arm: str
    benchmark: str
    measure: str
    n: int
    dropped: int
    seeds: int
    value: float
    low: float
    high: float
    seed_low: float
    seed_high: float
    compared: Difference | None = None
    """How the arm differs from the reference; None if it is not tested."""

    @property
    def label(self) -> str:
        """`StrongReject safety`."""
        return measure_label(self.benchmark, self.measure)


@dataclass(frozen=True)
class ArmDifference:
    """How an arm differs from another, the reference, in one measure."""

    reference: str
    arm: str
    benchmark: str
    measure: str
    compared: Difference

    @property
    def label(self) -> str:
        """`StrongReject safety`."""
        return measure_label(self.benchmark, self.measure)


@dataclass(frozen=True)
class ExperimentResults:
    """All results of an experiment: what its tables, CSV files and page are made from."""

    experiment: Experiment
    arms: Sequence[Arm]
    trained: Sequence[Job]
    """The jobs that are trained and evaluated."""
    notes: Sequence[str] = ()
    """What a reader of the page has to know."""
    measures: Sequence[ArmMeasure] | None = None
    """See `summarise_arms`; None without arms, or if none is trained."""
    differences: Sequence[ArmDifference] | None = None
    """See `arm_differences`."""
    rates: Sequence[RateTrial] = ()
    """See `rates_tried`."""
    findings: Sequence[Finding] = ()
    stages: Sequence[TimedStage] = ()
    """Everything that the experiment does, finished or not."""


def arm_table(kind: type[ArmMeasure | ArmDifference | RateTrial], rows: Sequence[Any]) -> pa.Table:
    """Rows of one kind as a table, also without any row; a comparison is in columns of its own."""
    types = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    columns: list[tuple[str, pa.DataType]] = []
    for one in fields(kind):
        if one.name == "compared":
            columns += [
                (name, types["int" if number == "n" else "float"]) for name, number in _COMPARED.items()
            ]
        else:
            columns.append((one.name, types[str(one.type).partition(" ")[0]]))
    return pa.Table.from_pylist([_flat(asdict(row)) for row in rows], schema=pa.schema(columns))


_COMPARED = {
    "paired_n": "n",
    "first": "first",
    "second": "second",
    "difference": "difference",
    "difference_low": "low",
    "difference_high": "high",
    "p": "p",
}
"""Column of a comparison -> its name in `Difference`."""


def _flat(row: dict[str, Any]) -> Mapping[str, Any]:
    """A row with the numbers of its comparison in columns of their own, empty where it has none."""
    found = row.pop("compared", None) or {}
    return row | {column: found.get(number) for column, number in _COMPARED.items()}


def summarise_arms(evaluations: dict[str, list[Evaluation]], reference: str) -> list[ArmMeasure]:
    """One for each arm, benchmark and measure, from the evaluations of its models, one of each seed.

    `value` is the mean over prompts and seeds; `low` and `high` its 95 % interval over clusters, see `mean`;
    `seed_low` and `seed_high` the lowest and highest value of a single seed. Prompts with a verdict at some
    seeds alone count at none and are `dropped`. `compared` is the difference from the arm `reference`, where
    it is there, over the prompts of both, each prompt's mean over the seeds: how much other seeds would
    change is not in it. Of capability benchmarks only sums
    are known: the mean of the seeds and of their bounds, without a test.
    """
    values = {arm: [item_values(seed.scores) for seed in seeds] for arm, seeds in evaluations.items()}
    of = _all_clusters(evaluations)
    rows: list[ArmMeasure] = []
    for arm, seeds in values.items():
        for key in dict.fromkeys(key for seed in seeds for key in seed):
            means, dropped = item_means([seed.get(key, {}) for seed in seeds])
            if not means:
                continue
            each = [float(np.mean([seed[key][item] for item in means])) for seed in seeds]
            estimate = mean(list(means.values()), [of[item] for item in means])
            compared = None
            if arm != reference and reference in values:
                first = [seed.get(key, {}) for seed in values[reference]]
                compared = _compared(item_means(first)[0], means, of)
            rows.append(_measure(arm, key, each, estimate, dropped=dropped, compared=compared))
        rows += _capability(arm, [seed.summary for seed in evaluations[arm]])
    return rows


def arm_differences(evaluations: dict[str, list[Evaluation]]) -> list[ArmDifference]:
    """How every two arms differ in the main measures, as `summarise_arms` has it of those with its reference.

    One for each two arms, benchmark and measure: `difference` is `arm` − `reference`, the one that comes
    first. Of capability benchmarks only sums are known, so they are not here.
    """
    means: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for arm, seeds in evaluations.items():
        values = [item_values(seed.scores) for seed in seeds]
        keys = dict.fromkeys(key for seed in values for key in seed if is_main(*key))
        means[arm] = {key: item_means([seed.get(key, {}) for seed in values])[0] for key in keys}
    of, rows = _all_clusters(evaluations), []
    for first, second in combinations(means, 2):
        for key, items in means[first].items():
            if compared := _compared(items, means[second].get(key, {}), of):
                rows.append(ArmDifference(first, second, *key, compared))
    return rows


def _all_clusters(evaluations: Mapping[str, Sequence[Evaluation]]) -> dict[str, str]:
    """What every item asks about, see `item_clusters`."""
    tables = [seed.scores for seeds in evaluations.values() for seed in seeds]
    return {item: cluster for table in tables for item, cluster in item_clusters(table).items()}


def _capability(arm: str, seeds: Sequence[Summary]) -> Iterator[ArmMeasure]:
    for benchmark in seeds[0].capability:
        found = [accuracy for seed in seeds if (accuracy := seed.accuracy(benchmark))]
        if len(found) == len(seeds):
            means: dict[str, Any] = {
                end: float(np.mean([getattr(one, end) for one in found])) for end in _VALUES
            }
            each = [accuracy.known for accuracy in found]
            yield _measure(arm, (benchmark, ACCURACY.name), each, replace(found[0], **means), dropped=0)


_VALUES = ("value", "low", "high")


def _measure(arm: str, key: MeasureKey, each: Sequence[float], over: Estimate, **further: Any) -> ArmMeasure:
    """`each` has the value of each seed, `over` that of all; `further` has `dropped` and `compared`."""
    benchmark, measure = key
    return ArmMeasure(
        arm,
        benchmark,
        measure,
        n=over.n,
        seeds=len(each),
        **{end: getattr(over, end) for end in _VALUES},
        seed_low=min(each),
        seed_high=max(each),
        **further,
    )


def _compared(
    first: Mapping[str, float], second: Mapping[str, float], of: Mapping[str, str]
) -> Difference | None:
    """How the second differs from the first on the prompts of both; None where there are none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    a, b = ([side[item] for item in both] for side in (first, second))
    return paired_difference(a, b, [of[item] for item in both])


def item_means(seeds: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """(each item's mean over the seeds, of those with a value at every seed; how many have not)"""
    everywhere = set.intersection(*map(set, seeds))
    somewhere = set.union(*map(set, seeds))
    means = {item: float(np.mean([seed[item] for seed in seeds])) for item in sorted(everywhere)}
    return means, len(somewhere) - len(everywhere)
