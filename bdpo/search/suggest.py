"""Which trial a search tries next: a grid, random draws, or TPE through Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bdpo.config import Config
from bdpo.config.derive import Params, value_at
from bdpo.search.space import _rounded, _takes_whole_numbers, _within, grid
from bdpo.search.trials import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


STARTUP_TRIALS = 5  # random ones, before TPE has anything to go by

# How often a setting that a trial has already is asked for anew: of TPE, then of chance
_ASKED_OF_TPE, _ASKED = 10, 200


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
