"""The results of an experiment: a row for each arm and measure, a row for each difference, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from bdpo.evaluation.benchmarks.registry import is_main, measure_label
from bdpo.evaluation.compare import item_clusters, item_values
from bdpo.evaluation.results import Evaluation
from bdpo.experiments.arms import Arm
from bdpo.experiments.experiment import Experiment, Finding
from bdpo.experiments.jobs import Job
from bdpo.reports.cost import TimedStage
from bdpo.stats import mean, paired_difference

BASE = "base"

RESULT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("arm", "benchmark", "measure")),
        *((name, pa.int64()) for name in ("n", "dropped", "seeds")),
        *((name, pa.float64()) for name in ("value", "low", "high", "seed_low", "seed_high")),
        ("paired_n", pa.int64()),
        *((name, pa.float64()) for name in ("first", "second", "difference")),
        *((name, pa.float64()) for name in ("difference_low", "difference_high", "p")),
    ]
)

DIFFERENCE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("reference", "arm", "benchmark", "measure")),
        *(RESULT_SCHEMA.field(name) for name in RESULT_SCHEMA.names[RESULT_SCHEMA.names.index("paired_n") :]),
    ]
)


@dataclass(frozen=True)
class ArmMeasure:
    """A row of RESULT_SCHEMA: one measure of one arm; from `paired_n` on None if it is not tested."""

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
    paired_n: int | None = None
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None

    @property
    def label(self) -> str:
        """`StrongReject safety`."""
        return measure_label(self.benchmark, self.measure)


@dataclass(frozen=True)
class ArmDifference:
    """A row of DIFFERENCE_SCHEMA: how an arm differs from another, the reference, in one measure."""

    reference: str
    arm: str
    benchmark: str
    measure: str
    paired_n: int
    first: float
    second: float
    difference: float
    difference_low: float | None
    difference_high: float | None
    p: float

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
    measures: pa.Table | None = None
    """See `summarise_arms`; None without arms, or if none is trained."""
    differences: pa.Table | None = None
    """See `arm_differences`."""
    rates: pa.Table | None = None
    """See `rates_table`; None without a search for learning rates."""
    findings: Sequence[Finding] = ()
    stages: Sequence[TimedStage] = ()
    """Everything that the experiment does, finished or not."""


def summarise_arms(evaluations: dict[str, list[Evaluation]], reference: str) -> pa.Table:
    """A row for each arm, benchmark and measure, from the evaluations of its models, one of each seed.

    `value` is the mean over prompts and seeds; `low` and `high` its 95 % interval over clusters, see `mean`;
    `seed_low` and `seed_high` the lowest and highest value of a single seed. Prompts with a verdict at some
    seeds alone count at none and are `dropped`. `difference` (`second` − `first`), its interval and `p`
    compare with the arm `reference`, where it is there, over the `paired_n` prompts of both, each prompt's
    mean over the seeds: how much other seeds would change is not in them. Of capability benchmarks only sums
    are known: the mean of the seeds and of their bounds, without a test.
    """
    values = {arm: [item_values(seed.scores) for seed in seeds] for arm, seeds in evaluations.items()}
    of = _all_clusters(evaluations)
    rows = []
    for arm, seeds in values.items():
        for key in dict.fromkeys(key for seed in seeds for key in seed):
            means, dropped = item_means([seed.get(key, {}) for seed in seeds])
            if not means:
                continue
            each = [float(np.mean([seed[key][item] for item in means])) for seed in seeds]
            row = _row(arm, key, len(means), each) | {"dropped": dropped}
            row |= asdict(mean(list(means.values()), [of[item] for item in means]))
            if arm != reference and reference in values:
                first = [seed.get(key, {}) for seed in values[reference]]
                row |= _tested(item_means(first)[0], means, of)
            rows.append(row)
        rows += _capability(arm, [seed.summary.capability for seed in evaluations[arm]])
    return pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)


def arm_differences(evaluations: dict[str, list[Evaluation]]) -> pa.Table:
    """How every two arms differ in the main measures, as `summarise_arms` has it of those with its reference.

    A row for each two arms, benchmark and measure: `difference` is `arm` − `reference`, the one that comes
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
            if tested := _tested(items, means[second].get(key, {}), of):
                named = {"reference": first, "arm": second, "benchmark": key[0], "measure": key[1]}
                rows.append(named | tested)
    return pa.Table.from_pylist(rows, schema=DIFFERENCE_SCHEMA)


def _all_clusters(evaluations: Mapping[str, Sequence[Evaluation]]) -> dict[str, str]:
    """What every item asks about, see `item_clusters`."""
    tables = [seed.scores for seeds in evaluations.values() for seed in seeds]
    return {item: cluster for table in tables for item, cluster in item_clusters(table).items()}


def _capability(arm: str, seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for benchmark in seeds[0]:
        found = [seed.get(benchmark, {}).get("accuracy") for seed in seeds]
        if all(found):
            bounds = {end: float(np.mean([f[end] for f in found])) for end in ("value", "low", "high")}
            each = [f["value"] for f in found]
            rows.append({**_row(arm, (benchmark, "accuracy"), found[0]["n"], each), **bounds})
    return rows


def _row(arm: str, key: tuple[str, str], n: int, each: Sequence[float]) -> dict[str, str | float]:
    row: dict[str, str | float] = {
        "arm": arm,
        "benchmark": key[0],
        "measure": key[1],
        "n": n,
        "dropped": 0,
        "seeds": len(each),
    }
    return row | {"seed_low": min(each), "seed_high": max(each)}


def _tested(
    first: Mapping[str, float], second: Mapping[str, float], of: Mapping[str, str]
) -> dict[str, float]:
    """How the second differs from the first on the prompts of both; nothing where there are none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return {}
    a, b = ([side[item] for item in both] for side in (first, second))
    compared = paired_difference(a, b, [of[item] for item in both])
    names = {"n": "paired_n", "low": "difference_low", "high": "difference_high"}
    return {names.get(key, key): value for key, value in asdict(compared).items() if key != "test"}


def item_means(seeds: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """(each item's mean over the seeds, of those with a value at every seed; how many have not)"""
    everywhere = set.intersection(*map(set, seeds))
    somewhere = set.union(*map(set, seeds))
    means = {item: float(np.mean([seed[item] for seed in seeds])) for item in sorted(everywhere)}
    return means, len(somewhere) - len(everywhere)
