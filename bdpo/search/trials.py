"""The trials of a search: their rungs, which are promoted (ASHA), the winner, the table of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bdpo.config import Config, TuneConfig
from bdpo.config.derive import Params, trial_config
from bdpo.errors import UserError
from bdpo.search.space import end_values
from bdpo.training.batches import plan_without_lengths
from bdpo.variants.ends import End, Failure
from bdpo.variants.objective import Measured


@dataclass(frozen=True)
class Rung:
    """The evaluation of a trial after a number of steps."""

    step: int
    measured: Measured
    finished: float
    """Seconds since the epoch by the clock of the trial's node; no decision depends on it."""
    train_seconds: float = 0.0
    """Seconds from the previous rung, or the start, until the model of this one was exported."""
    evaluate_seconds: float = 0.0
    before: Sequence[str] = ()
    """Names of the trials that had reached this rung when it was recorded."""


@dataclass(frozen=True)
class Trial:
    """A trial and how far it is."""

    name: str
    params: Params
    rungs: Sequence[Rung] = ()
    failure: Failure | None = None


def check_rungs(config: Config, pairs: int) -> None:
    """Make sure that the rungs of every trial on so many pairs are different steps.

    Raises:
        UserError: see `rung_steps`.
    """
    ends = ({key: end} for key, dim in config.tune.space.items() for end in end_values(key, dim))
    for params in [{}, *ends]:
        trial = trial_config(config, params, config.run_dir)
        rung_steps(trial.tune.rungs, plan_without_lengths(pairs, trial.train, trial.seed).total_steps)


def rung_steps(rungs: Sequence[float], total_steps: int) -> list[int]:
    """The steps after which a trial is evaluated: shares of its total steps, rounded up.

    Raises:
        UserError: two rungs are the same step.
    """
    steps = [math.ceil(share * total_steps - 1e-9) for share in rungs]
    if len(set(steps)) < len(steps):
        raise UserError(
            f"tune.rungs={list(rungs)}: of {total_steps} steps these are {steps}; use fewer rungs"
        )
    return steps


def asha_promotes(score: float, earlier: Sequence[float], reduction_factor: float) -> bool:
    """Whether asynchronous successive halving promotes a trial with this score at a rung.

    ASHA (Li et al., arXiv 1810.05934) with the rule of Ray Tune's scheduler: a trial is promoted if its score
    is not below the quantile 1 − 1 / `reduction_factor` of the scores that reached the rung before it.
    """
    return not earlier or score >= float(np.percentile(earlier, 100 * (1 - 1 / reduction_factor)))


def is_promoted(trial: Trial, trials: Sequence[Trial], tune: TuneConfig) -> bool:
    """Whether a trial is promoted from the last rung that it reached; the answer never changes later."""
    number = len(trial.rungs) - 1
    rung = trial.rungs[number]
    earlier = [other.rungs[number].measured.score for other in trials if other.name in rung.before]
    return asha_promotes(rung.measured.score, earlier, tune.reduction_factor)


def end_of(trial: Trial, trials: Sequence[Trial], tune: TuneConfig) -> End:
    """How a trial ended, or OPEN."""
    if len(trial.rungs) == len(tune.rungs):
        return End.COMPLETED
    if trial.failure is not None:
        return trial.failure.end
    return End.STOPPED if trial.rungs and not is_promoted(trial, trials, tune) else End.OPEN


def winner(trials: Sequence[Trial], tune: TuneConfig) -> Trial | None:
    """The best completed trial within the bound; of equal ones the higher constraint, then the first."""
    feasible = [
        trial
        for trial in trials
        if len(trial.rungs) == len(tune.rungs) and trial.rungs[-1].measured.violation <= 0
    ]
    return max(feasible, key=lambda trial: trial.rungs[-1].measured.rank, default=None)


def results_table(trials: Sequence[Trial], tune: TuneConfig) -> pa.Table:
    """One row a trial: its parameters, how far it is, and the results of its last rung."""
    best = winner(trials, tune)
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.name, "status": str(end_of(trial, trials, tune))}
        row |= {"winner": best is not None and trial.name == best.name} | trial.params
        row |= {"rungs": len(trial.rungs), "error": trial.failure and trial.failure.error}
        for name in ("train_seconds", "evaluate_seconds"):
            row[name] = sum(getattr(rung, name) for rung in trial.rungs)
        rows.append(row | (_last_rung(trial.rungs[-1], tune) if trial.rungs else {}))
    columns = {name: None for row in rows for name in row}
    return pa.table({name: _column([row.get(name) for row in rows]) for name in columns})


def _last_rung(rung: Rung, tune: TuneConfig) -> dict[str, float | None]:
    measured = rung.measured
    row: dict[str, float | None] = {"step": rung.step, "score": measured.score, "finished": rung.finished}
    row |= {"feasible": measured.violation <= 0, "least": measured.base - tune.max_over_refusal}
    row["broken"] = measured.broken
    for name, estimate in (("objective", measured.objective), ("constraint", measured.constrained)):
        row |= estimate.columns(name) | {f"{name}_n": estimate.n}
    return row


def _column(values: list[Any]) -> pa.Array:
    """A column; a list of mixed types, `[1, "auto"]`, becomes texts."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
