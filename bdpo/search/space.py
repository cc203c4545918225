"""The space of a search: which keys of `method` and `train` it varies, and between which values.

Neither Ray nor files are used in this package, but for the folder of a sweep (`bdpo.search.sweep`). Every
decision is a function of the config and of the results so far, so a sweep that was killed continues as if it
had not been.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, TypeAlias, get_args

from bdpo.config import Config, Range
from bdpo.config.derive import Params, trial_config
from bdpo.errors import UserError
from bdpo.method.losses import METHODS

Training: TypeAlias = tuple[Mapping[str, object], Mapping[str, object]]
"""Settings of the loss and of the training."""


def check_space(config: Config) -> None:
    """Make sure that every value of the space is allowed in the config of a trial.

    Raises:
        UserError: an unknown key, a key that is not searched, a value that the key does not take, or
            `load_best_model_at_end`, with which a trial would not end with its last model.
    """
    for key, dimension in config.tune.space.items():
        section, _, name = key.partition(".")
        trials = [
            trial_config(config, {**named, key: value}, config.run_dir)
            for named in _methods_with(key, config)
            for value in end_values(key, dimension)
        ]
        # Rungs add checkpoints to choose from: trained again without rungs, the trial would export another.
        if any(trial.train.load_best_model_at_end for trial in trials):
            raise UserError("train.load_best_model_at_end: a sweep compares last models; set it false")
        # Trials share the scores and prompts of the run, and where a training runs does not change it.
        runtime_only = config.train.runtime_only_keys()
        if section not in ("method", "train") or name in runtime_only:
            raise UserError(
                f"tune.space: {key} is not searched; method and train are, but for where and how they run "
                f"({', '.join(sorted(runtime_only))})"
            )
    if config.tune.searcher == "grid":
        grid(config)  # which makes the config of every combination


def _methods_with(key: str, config: Config) -> list[Params]:
    """The methods of the space that have a key, as parameters; [{}] where the method of the run decides."""
    names = config.tune.space.get("method.name", [])
    section, _, leaf = key.partition(".")
    if key == "method.name" or section != "method" or not isinstance(names, list):
        return [{}]
    with_key = [name for name in names if name in METHODS and leaf in METHODS[str(name)].model_fields]
    return [{"method.name": name} for name in with_key] or [{}]


def grid(config: Config) -> list[Params]:
    """The combinations of the values of a space of lists; the last key changes fastest.

    Of combinations that train the same model only the first is there.
    """
    space = config.tune.space
    combinations = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
    trained: list[Training] = []
    found = []
    for params in combinations:
        training = training_of(config, params)
        if training not in trained:
            trained.append(training)
            found.append(params)
    return found


def number_of_trials(config: Config) -> int:
    """How many trials the search has: `num_samples`, or the combinations of a grid."""
    return len(grid(config)) if config.tune.searcher == "grid" else config.tune.num_samples


def training_of(config: Config, params: Params) -> Training:
    """What the model of a trial depends on: trials with equal ones train the same model.

    Keys that stand in the loss as their product (alpha and beta of B-DPO) count as one, to four digits.
    """
    trial = trial_config(config, params, config.run_dir)
    loss = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in trial.method.loss_settings().items()
    }
    return loss, trial.train.fingerprint()


def product_keys(config: Config) -> list[str]:
    """The keys of the space that stand in the loss as their product alone, if there are several."""
    keys = [f"method.{key}" for key in config.method.product_keys]
    searched = [key for key in keys if key in config.tune.space]
    return searched if len(searched) > 1 else []


def within(dimension: Any, value: Any) -> bool:
    """Whether a value lies in a dimension of the space."""
    if isinstance(dimension, Range):
        return value is not None and dimension.min <= value <= dimension.max
    return value in dimension


def rounded(dimension: Any, value: Any) -> Any:
    """A value with four significant digits that is still within the range."""
    if not isinstance(dimension, Range) or isinstance(value, int):
        return value
    return min(max(float(f"{value:.4g}"), dimension.min), dimension.max)


def takes_integers(key: str) -> bool:
    """Whether a key takes integers; False for an unknown key, which `check_space` refuses."""
    annotation: Any = Config
    for name in key.split("."):
        sections = (annotation, *get_args(annotation))  # the first class of `LoraConfig | None`
        fields = [getattr(section, "model_fields", {}).get(name) for section in sections]
        annotation = next((field.annotation for field in fields if field is not None), None)
    return _has_int(annotation)


def _has_int(annotation: Any) -> bool:
    """Whether a type is `int`, or contains it: `int | None`, `Annotated[int, ...]`."""
    return annotation is int or any(_has_int(part) for part in get_args(annotation))


def end_values(key: str, dimension: Range | list[Any]) -> list[Any]:
    """All values of a list, or both ends of a range, with the type that the key requires."""
    if isinstance(dimension, list):
        return dimension
    ends = (dimension.min, dimension.max)
    return [int(end) if takes_integers(key) and end == int(end) else end for end in ends]
