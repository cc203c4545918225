"""A search over method and training settings, as plain data: space, suggestions, objective, rungs, winner.

No Ray and no files here. Everything is a function of the config and of what trials have shown so far, so
that a sweep which was killed goes on exactly as it would have.
"""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

from bdpo.config import Config, Range, TuneConfig
from bdpo.config.derive import Params, trial_config
from bdpo.config.train import HOW_IT_RUNS
from bdpo.errors import UserError

Estimate = dict[str, Any]


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


def grid(tune: TuneConfig) -> list[Params]:
    """Every combination of a space of lists; the last key changes fastest."""
    return [dict(zip(tune.space, values, strict=True)) for values in product(*tune.space.values())]


def number_of_trials(tune: TuneConfig) -> int:
    """`num_samples`, or all of a grid."""
    return len(grid(tune)) if tune.searcher == "grid" else tune.num_samples


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
