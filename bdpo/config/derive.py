"""Configs that are made from another: values at dotted keys, a trial's config, a part of the prompts."""

from __future__ import annotations

from typing import Any

from bdpo.config import Config, parse_config
from bdpo.config.method import default_beta

Params = dict[str, Any]  # dotted config key -> value


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
