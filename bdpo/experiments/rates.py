"""The learning rate of each arm: every arm may take the best of several rates, by the rule of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from bdpo.config import Config
from bdpo.config.derive import part_of
from bdpo.evaluation.results import read_evaluation
from bdpo.experiments.arms import Arm, Record, base_run
from bdpo.experiments.jobs import rate_jobs
from bdpo.stats import ENDS
from bdpo.storage.run_dir import RunDir
from bdpo.variants.objective import Measured, measure

RATE = "train.learning_rate"

RATES_SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("learning_rate", pa.float64()),
        *((f"{name}{end}", pa.float64()) for name in ("objective", "constraint") for end in ENDS),
        ("least", pa.float64()),
        *((name, pa.bool_()) for name in ("feasible", "chosen")),
    ]
)


def rate_trials(config: Config, arm: Arm) -> list[Arm]:
    """An arm at every learning rate that it may take; none if the run's rate is that of all arms."""
    rates = config.experiment.learning_rates
    return [Arm(f"{arm.name}-{rate}", arm.params | {RATE: rate}) for rate in rates]


def best_trial(trials: Sequence[Arm], measured: Mapping[str, Measured]) -> Arm | None:
    """The best of the trials that are measured, by the rule of a search; of equal ones the first."""
    known = (trial for trial in trials if trial.name in measured)
    return max(known, key=lambda trial: measured[trial.name].rank, default=None)


def measured_trials(config: Config, run: RunDir, trials: Sequence[Arm]) -> dict[str, Measured]:
    """Objective and constraint of the trials that are trained and evaluated, by name."""
    base = read_evaluation(base_run(part_of(config, "search"), run).eval("base")).scores
    return {
        job.arm: measure(config.tune, read_evaluation(job.run.eval("trained")).scores, base)
        for job in rate_jobs(config, run, trials)
        if job.done
    }


def rates_table(run: RunDir, record: Record) -> pa.Table | None:
    """A row an arm and learning rate: its results, and which rate is `chosen`; None without a search.

    `objective` and `constraint` are `tune.metric` and `tune.constraint`, null where the arm could not be
    trained, or its answers not be judged; `feasible` is a constraint of at least `least`.
    """
    if not record.trials:
        return None
    measured, bound = measured_trials(record.config, run, record.trials), record.config.tune.max_over_refusal
    rows = []
    for trial in record.trials:
        rate = trial.params[RATE]
        arm = next(arm for arm in record.arms if arm.params | {RATE: rate} == trial.params)
        row = {"arm": arm.name, "learning_rate": rate, "chosen": arm.params[RATE] == rate}
        rows.append(row | (_measures(measured[trial.name], bound) if trial.name in measured else {}))
    return pa.Table.from_pylist(rows, schema=RATES_SCHEMA)


def _measures(found: Measured, max_over_refusal: float) -> dict[str, float | None]:
    estimates = {"objective": found.objective, "constraint": found.constrained}
    numbers: dict[str, float | None] = {}
    for name, estimate in estimates.items():
        numbers |= estimate.columns(name)
    return numbers | {"least": found.base - max_over_refusal, "feasible": found.violation <= 0}
