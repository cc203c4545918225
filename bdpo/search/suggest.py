"""Which trial a search tries next: a grid, random draws, or TPE through Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bdpo.config import Config
from bdpo.config.derive import Params, value_at
from bdpo.errors import UserError
from bdpo.search.space import Training, grid, rounded, takes_integers, training_of, within
from bdpo.search.trials import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


STARTUP_TRIALS = 5
"""Random trials before TPE has enough results to learn from."""

# How many draws are made until a setting is new: the first from TPE, all others at random.
_TPE_DRAWS, _DRAWS = 10, 200


def suggest(config: Config, number: int, history: Sequence[Trial]) -> Params:
    """The parameters of trial `number`: a function of the seed, the number and the trials so far.

    The first is the config as it stands, if that lies in the space. TPE learns from completed trials and
    from the last rung of stopped ones, and avoids the neighbourhood of open ones; infeasible trials count
    as worse than all others (Watanabe & Hutter, arXiv 2211.14411). A setting that trains the same model as
    another trial is not suggested, unless 200 draws find no other.
    """
    tune = config.tune
    if tune.searcher == "grid":
        return grid(config)[number]
    unchanged = {key: value_at(config, key) for key in tune.space}
    if number == 0 and all(within(tune.space[key], value) for key, value in unchanged.items()):
        return unchanged
    trained = [_training(config, trial.params) for trial in history]
    for attempt in range(_DRAWS):
        params = _ask(config, [config.seed, number, attempt], history)
        training = _training(config, params)
        if training is None or training not in trained:
            break
    return params


def _training(config: Config, params: Params) -> Training | None:
    """See `training_of`; None for values that do not go together, whose trial will fail."""
    try:
        return training_of(config, params)
    except UserError:
        return None


def _ask(config: Config, seeds: list[int], history: Sequence[Trial]) -> Params:
    """One draw; the last of the seeds is the number of rejected draws before it."""
    import optuna

    tune = config.tune
    distributions = {key: _distribution(key, dimension) for key, dimension in tune.space.items()}
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
    if tune.searcher == "optuna" and seeds[-1] < _TPE_DRAWS:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in history:
        study.add_trial(_observed(trial, distributions, len(tune.rungs)))
    params = study.ask(distributions).params
    return {key: rounded(tune.space[key], params[key]) for key in tune.space}


def _distribution(key: str, dimension: Any) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, list):
        return CategoricalDistribution(dimension)
    if takes_integers(key):
        return IntDistribution(int(dimension.min), int(dimension.max), log=dimension.log)
    return FloatDistribution(dimension.min, dimension.max, log=dimension.log)


def _observed(trial: Trial, distributions: dict[str, BaseDistribution], rungs: int) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    known: dict[str, Any] = {"params": trial.params, "distributions": distributions}
    if trial.rungs:
        known["constraints"] = {"over-refusal": trial.rungs[-1].measured.violation}
    if trial.failure is not None:
        return create_trial(state=TrialState.FAIL, **known)
    values = {rung.step: rung.measured.objective.known for rung in trial.rungs}
    if len(values) == rungs:
        return create_trial(state=TrialState.COMPLETE, value=values[trial.rungs[-1].step], **known)
    if values:  # stopped or open: TPE learns from the last rung
        return create_trial(state=TrialState.PRUNED, intermediate_values=values, **known)
    return create_trial(state=TrialState.RUNNING, **known)
