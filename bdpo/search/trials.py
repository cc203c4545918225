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
from bdpo.search.objective import Measured
from bdpo.search.space import _ends
from bdpo.training.batches import outline


@dataclass(frozen=True)
class Rung:
    """What a trial showed at a rung."""

    step: int
    measured: Measured
    finished: float
    """Seconds since the epoch, by the clock of its node: nothing is decided by it."""
    train_seconds: float = 0.0
    """From the rung before, or the start, until the model was there."""
    evaluate_seconds: float = 0.0
    before: Sequence[str] = ()
    """Trials that were at this rung when it was recorded."""


@dataclass(frozen=True)
class Trial:
    """A trial and how far it came."""

    name: str
    params: Params
    rungs: Sequence[Rung] = ()
    failure: dict[str, Any] | None = None
    """`kind`, failed, invalid or lost, and `error` in one line."""


def check_rungs(config: Config, pairs: int) -> None:
    """Make sure that the rungs of every trial on so many pairs are different steps.

    Raises:
        UserError: see `rung_steps`.
    """
    for params in [{}, *({key: end} for key, dim in config.tune.space.items() for end in _ends(key, dim))]:
        trial = trial_config(config, params, config.run_dir)
        rung_steps(trial.tune.rungs, outline(pairs, trial.train, trial.seed).total_steps)


def rung_steps(rungs: Sequence[float], steps_in_all: int) -> list[int]:
    """The steps after which a trial is evaluated: shares of its own total, rounded up.

    Raises:
        UserError: two rungs fall on one step.
    """
    steps = [math.ceil(share * steps_in_all - 1e-9) for share in rungs]
    if len(set(steps)) < len(steps):
        raise UserError(
            f"tune.rungs={list(rungs)}: of {steps_in_all} steps these are {steps}; use fewer rungs"
        )
    return steps


def goes_on(score: float, earlier: Sequence[float], reduction_factor: float) -> bool:
    """Does a trial that scored this at a rung go on, after those that were there before?

    Asynchronous successive halving (Li et al., arXiv 1810.05934), with the rule of Ray Tune's scheduler:
    it goes on if it is not below the quantile 1 − 1 / `reduction_factor` of the earlier ones.
    """
    return not earlier or score >= float(np.percentile(earlier, 100 * (1 - 1 / reduction_factor)))


def survives(trial: Trial, trials: Sequence[Trial], tune: TuneConfig) -> bool:
    """Does a trial go on from the last rung that it reached? The same answer whenever it is asked."""
    number = len(trial.rungs) - 1
    rung = trial.rungs[number]
    earlier = [other.rungs[number].measured.score for other in trials if other.name in rung.before]
    return goes_on(rung.measured.score, earlier, tune.reduction_factor)


def status(trial: Trial, trials: Sequence[Trial], tune: TuneConfig) -> str:
    """`completed`, `failed`, `invalid`, `lost`, `stopped` at a rung, or `open`."""
    if len(trial.rungs) == len(tune.rungs):
        return "completed"
    if trial.failure is not None:
        return str(trial.failure["kind"])
    return "stopped" if trial.rungs and not survives(trial, trials, tune) else "open"


def winner(trials: Sequence[Trial], tune: TuneConfig) -> Trial | None:
    """The best completed trial within the bound; of equals the one that complies more, then the first."""
    feasible = [
        trial
        for trial in trials
        if len(trial.rungs) == len(tune.rungs) and trial.rungs[-1].measured.violation <= 0
    ]

    return max(feasible, key=lambda trial: trial.rungs[-1].measured.rank, default=None)  # the first of equals


def results_table(trials: Sequence[Trial], tune: TuneConfig) -> pa.Table:
    """One row a trial: parameters, how far it came, and what its last rung showed."""
    best = winner(trials, tune)
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.name, "status": status(trial, trials, tune)}
        row |= {"winner": best is not None and trial.name == best.name} | trial.params
        row |= {"rungs": len(trial.rungs), "error": (trial.failure or {}).get("error")}
        for name in ("train_seconds", "evaluate_seconds"):
            row[name] = sum(getattr(rung, name) for rung in trial.rungs)
        if trial.rungs:
            last = trial.rungs[-1]
            row |= {"step": last.step, "score": last.measured.score, "finished": last.finished}
            row |= {
                "feasible": last.measured.violation <= 0,
                "least": last.measured.base - tune.max_over_refusal,
            }
            for name, estimate in (
                ("objective", last.measured.objective),
                ("constraint", last.measured.constrained),
            ):
                row |= {name: estimate["value"], f"{name}_low": estimate["low"]}
                row |= {f"{name}_high": estimate["high"], f"{name}_n": estimate["n"]}
        rows.append(row)
    columns = {name: None for row in rows for name in row}
    return pa.table({name: _column([row.get(name) for row in rows]) for name in columns})


def _column(values: list[Any]) -> pa.Array:
    """Of a list of mixed values, `[1, "auto"]`, the texts."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
