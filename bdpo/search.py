"""A search over method and training settings, as plain data: space, suggestions, objective, rungs, winner.

No Ray and no files here. Everything is a function of the config and of what trials have shown so far, so
that a sweep which was killed goes on exactly as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config import Config, Range, TuneConfig, parse_config
from bdpo.config.method import default_beta
from bdpo.config.train import HOW_IT_RUNS
from bdpo.errors import UserError
from bdpo.evaluation.summary import invalid_lines, measures, summarise
from bdpo.plan import outline

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Params = dict[str, Any]  # dotted config key -> value
Estimate = dict[str, Any]

STARTUP_TRIALS = 5  # random ones, before TPE has anything to go by
# How often a setting that a trial has already is asked for anew: of TPE, then of chance
_ASKED_OF_TPE, _ASKED = 10, 200
_MORE_IS_BETTER = {"safety", "safe_rate", "compliance", "unsafe_refusal", "correct", "correct_if_attempted"}


class InvalidEvaluation(Exception):
    """Too many verdicts are missing: there is no score, and none is made up."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation says of a trial."""

    objective: Estimate
    """`tune.metric`, as `summarise` gives it."""
    constrained: Estimate
    """`tune.constraint`."""
    base: float
    """`tune.constraint` of the base model on the same prompts."""
    violation: float
    """How far `constrained` is below what it may be; not above 0 is feasible."""

    @property
    def score(self) -> float:
        """Ranks trials: the objective of a feasible one, less than any of those for the others.

        After Deb, "An efficient constraint handling method for genetic algorithms" (2000): of two trials
        that are not feasible the one that is less so is better. The objective is never below 0.
        """
        return float(self.objective["value"]) if self.violation <= 0 else -self.violation

    @property
    def rank(self) -> tuple[float, float]:
        """Of equal scores that of the one that complies more is higher."""
        return self.score, self.constrained["value"]


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


def check_space(config: Config) -> None:
    """Make sure that every value of the space is one that a trial can have.

    Raises:
        UserError: an unknown key, one that is not searched, a value that the key does not take, or trials
            whose last model is not the one that they would end with.
    """
    for key, dimension in config.tune.space.items():
        section, _, name = key.partition(".")
        trials = [trial_config(config, {key: value}, config.run_dir) for value in _ends(key, dimension)]
        # Its rungs add checkpoints to choose from: trained again in one go, a trial would end with another.
        if any(trial.train.load_best_model_at_end for trial in trials):
            raise UserError("train.load_best_model_at_end: a sweep compares last models; set it false")
        # A trial shares the run's scores and yardstick, and how it runs is not what it is.
        if section not in ("method", "train") or name in HOW_IT_RUNS:
            raise UserError(
                f"tune.space: {key} is not searched; method and train are, but for where and how they run "
                f"({', '.join(sorted(HOW_IT_RUNS))})"
            )
    if config.tune.searcher == "grid":
        for params in grid(config.tune):
            trial_config(config, params, config.run_dir)


def check_measures(config: Config) -> None:
    """Make sure that metric and constraint are measured, and are better the more there is of them.

    Raises:
        UserError: naming those that are.
    """
    known = [f"{name}.{measure}" for name in config.evaluate.benchmarks for measure in measures(name)]
    wanted = [path for path in known if path.partition(".")[2] in _MORE_IS_BETTER]
    for key in ("metric", "constraint"):
        path = getattr(config.tune, key)
        if path not in wanted:
            why = "more of it is not better" if path in known else "is not measured"
            raise UserError(f"tune.{key}={path}: {why}; wants one of {', '.join(wanted)}")


def check_measured(tune: TuneConfig, base_scores: pa.Table, items: Sequence[str], which: str) -> None:
    """Make sure that `items`, on which trials are going to be measured, measure metric and constraint.

    Raises:
        UserError: the base model cannot be measured on them.
    """
    known = base_scores.filter(pc.is_in(base_scores["item_id"], pa.array(items, pa.string())))
    try:
        measure(tune, known, known)
    except InvalidEvaluation as error:
        raise UserError(f"{which}: {error}; no trial could be measured on them") from None


def trial_config(config: Config, params: Params, run_dir: str, source: str = "tune.space") -> Config:
    """The config of a trial: the run's, with the parameters in their places.

    Another method has the β of its own where the run's is for another kind, see `beta_of`.
    """
    values = config.model_dump() | {"run_dir": run_dir}
    values["method"]["beta"] = beta_of(config, params.get("method.name", config.method.name))
    for key, value in params.items():
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            if not isinstance(place.get(section), dict):  # a section that is not set, as `train.lora`
                place[section] = {}
            place = place[section]
        place[leaf] = value
    return parse_config(values, source)


def beta_of(config: Config, method: str) -> float:
    """The β that a method takes of a run: the run's, or its own where the run's is for another kind."""
    own = default_beta(method)
    return config.method.beta if own == default_beta(config.method.name) else own


def value_at(config: Config, key: str) -> Any:
    """What a dotted key has in a config; None where its section is not set."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def part_of(config: Config, part: str, limit: int | None = None) -> Config:
    """The config that evaluates on one part of the prompts, on at most `limit` of each benchmark."""
    limits = [n for n in (config.evaluate.limit, limit) if n is not None]
    changes: dict[str, Any] = {"part": part, "limit": min(limits, default=None), "capability": []}
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})


def grid(tune: TuneConfig) -> list[Params]:
    """Every combination of a space of lists; the last key changes fastest."""
    return [dict(zip(tune.space, values, strict=True)) for values in product(*tune.space.values())]


def number_of_trials(tune: TuneConfig) -> int:
    """`num_samples`, or all of a grid."""
    return len(grid(tune)) if tune.searcher == "grid" else tune.num_samples


def suggest(config: Config, number: int, history: Sequence[Trial]) -> Params:
    """The parameters of trial `number`: a function of the seed, the number and the trials so far.

    The first is the config as it stands, where that lies in the space. TPE learns from finished trials,
    from stopped ones by their last rung, and keeps away from those that are under way; infeasible trials
    count as worse than all others (Watanabe & Hutter, arXiv 2211.14411). What a trial has already is not
    suggested again, unless in so many tries nothing else is found.
    """
    tune = config.tune
    if tune.searcher == "grid":
        return grid(tune)[number]
    as_it_stands = {key: value_at(config, key) for key in tune.space}
    if number == 0 and all(_within(tune.space[key], value) for key, value in as_it_stands.items()):
        return as_it_stands
    tried = [trial.params for trial in history]
    for attempt in range(_ASKED):
        params = _ask(config, [config.seed, number, attempt], history)
        if params not in tried:
            break
    return params


def _ask(config: Config, seeds: list[int], history: Sequence[Trial]) -> Params:
    """One suggestion; the last of the seeds is the number of those before it that were no use."""
    import optuna

    tune = config.tune
    distributions = {key: _distribution(key, dimension) for key, dimension in tune.space.items()}
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    if tune.searcher == "optuna" and seeds[-1] < _ASKED_OF_TPE:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in history:
        study.add_trial(_observed(trial, distributions, len(tune.rungs)))
    params = study.ask(distributions).params
    return {key: _rounded(tune.space[key], params[key]) for key in tune.space}


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


def measure(tune: TuneConfig, scores: pa.Table, base_scores: pa.Table) -> Measured:
    """Objective and constraint from per-item scores, the base model's on the same items.

    Raises:
        InvalidEvaluation: either has too many failed verdicts, or there is nothing to measure.
    """
    same = base_scores.filter(pc.is_in(base_scores["item_id"], scores["item_id"]))
    summary, base = _valid_summary("trial", scores), _valid_summary("base", same)
    objective, constrained = (_at(summary, path) for path in (tune.metric, tune.constraint))
    allowed = _at(base, tune.constraint)["value"] - tune.max_over_refusal
    # Rates of few prompts: what is equal on paper must not differ by rounding.
    violation = round(allowed - constrained["value"], 12)
    return Measured(objective, constrained, allowed + tune.max_over_refusal, violation)


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


def _valid_summary(name: str, scores: pa.Table) -> dict[str, Any]:
    summary = summarise(scores)
    if not summary["valid"]:
        raise InvalidEvaluation("; ".join(invalid_lines(name, summary)) or f"{name}: no scores")
    return summary


def _at(summary: dict[str, Any], path: str) -> Estimate:
    benchmark, _, name = path.partition(".")
    estimate: Estimate = summary["benchmarks"][benchmark][name]
    if estimate["value"] is None:
        raise InvalidEvaluation(f"{path}: no prompt of this part measures it")
    return estimate


def _distribution(key: str, dimension: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, list):
        return CategoricalDistribution(dimension)
    if _takes_whole_numbers(key):
        return IntDistribution(int(dimension.min), int(dimension.max), log=dimension.log)
    return FloatDistribution(dimension.min, dimension.max, log=dimension.log)


def _observed(trial: Trial, distributions: dict[str, BaseDistribution], rungs: int) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    known: dict[str, Any] = {"params": trial.params, "distributions": distributions}
    if trial.rungs:
        known["constraints"] = {"over-refusal": trial.rungs[-1].measured.violation}
    if trial.failure is not None:
        return create_trial(state=TrialState.FAIL, **known)
    values = {rung.step: float(rung.measured.objective["value"]) for rung in trial.rungs}
    if len(values) == rungs:
        return create_trial(state=TrialState.COMPLETE, value=values[trial.rungs[-1].step], **known)
    if values:  # stopped, or under way: both are worth what their last rung showed
        return create_trial(state=TrialState.PRUNED, intermediate_values=values, **known)
    return create_trial(state=TrialState.RUNNING, **known)


def _within(dimension: Any, value: Any) -> bool:
    if isinstance(dimension, Range):
        return value is not None and dimension.min <= value <= dimension.max
    return value in dimension


def _rounded(dimension: Any, value: Any) -> Any:
    """Four digits, as people write it in a paper, and still in the range."""
    if not isinstance(dimension, Range) or isinstance(value, int):
        return value
    return min(max(float(f"{value:.4g}"), dimension.min), dimension.max)


def _takes_whole_numbers(key: str) -> bool:
    """Of a key that there is; an unknown one is refused elsewhere."""
    annotation: Any = Config
    for name in key.split("."):
        sections = (annotation, *get_args(annotation))  # of `LoraConfig | None` the first
        fields = [getattr(section, "model_fields", {}).get(name) for section in sections]
        annotation = next((field.annotation for field in fields if field is not None), None)
    return _has_int(annotation)


def _has_int(annotation: Any) -> bool:
    """In `int`, `int | None`, and what is annotated with more."""
    return annotation is int or any(_has_int(part) for part in get_args(annotation))


def _ends(key: str, dimension: Range | list[Any]) -> list[Any]:
    """All values of a list, both ends of a range, as the key wants them."""
    if isinstance(dimension, list):
        return dimension
    ends = (dimension.min, dimension.max)
    return [int(end) if _takes_whole_numbers(key) and end == int(end) else end for end in ends]
