"""The learning rate of each arm: every arm may take the best of several rates, by the rule of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bdpo.config import Config
from bdpo.config.derive import part_of
from bdpo.evaluation.results import read_evaluation
from bdpo.experiments.arms import Arm, ExperimentRecord, base_run
from bdpo.experiments.jobs import rate_jobs
from bdpo.storage.run_dir import RunDir
from bdpo.variants.objective import Measured, measure

RATE = "train.learning_rate"


@dataclass(frozen=True)
class RateTrial:
    """An arm at one learning rate; what could not be trained, or not be judged, has no numbers.

    `objective` and `constraint` are `tune.metric` and `tune.constraint`; `feasible` is a constraint of at
    least `least`.
    """

    arm: str
    learning_rate: float
    objective: float | None = None
    objective_low: float | None = None
    objective_high: float | None = None
    constraint: float | None = None
    constraint_low: float | None = None
    constraint_high: float | None = None
    least: float | None = None
    feasible: bool | None = None
    chosen: bool = False


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


def rates_tried(run: RunDir, record: ExperimentRecord) -> list[RateTrial]:
    """The results of every arm at every learning rate; none without a search."""
    if not record.trials:
        return []
    measured, bound = measured_trials(record.config, run, record.trials), record.config.tune.max_over_refusal
    rows = []
    for trial in record.trials:
        rate = trial.params[RATE]
        arm = next(arm for arm in record.arms if arm.params | {RATE: rate} == trial.params)
        row = RateTrial(arm.name, rate, chosen=arm.params[RATE] == rate)
        rows.append(_with_results(row, measured[trial.name], bound) if trial.name in measured else row)
    return rows


def _with_results(row: RateTrial, found: Measured, max_over_refusal: float) -> RateTrial:
    return replace(
        row,
        objective=found.objective.value,
        objective_low=found.objective.low,
        objective_high=found.objective.high,
        constraint=found.constrained.value,
        constraint_low=found.constrained.low,
        constraint_high=found.constrained.high,
        least=found.base - max_over_refusal,
        feasible=found.violation <= 0,
    )
