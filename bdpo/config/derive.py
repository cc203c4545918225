"""Configs that are made from another: values at dotted keys, a trial's config, a part of the prompts."""

from __future__ import annotations

from typing import Any

from bdpo.config import Config, DataConfig, TamperConfig, parse_config
from bdpo.config.data import SelectConfig
from bdpo.config.kinds import lost_keys
from bdpo.config.reading import set_value
from bdpo.method.base import Method
from bdpo.method.losses import METHODS
from bdpo.method.reference_free import Sft

Params = dict[str, Any]  # dotted config key -> value


def trial_config(config: Config, params: Params, run_dir: str, source: str = "tune.space") -> Config:
    """The config of a trial: the run's, with the parameters in their places.

    If `method.name` is among the parameters, section `method` has the keys of that method, see
    `with_method`, and parameters that belong to other methods are left out: a space of several methods has
    the keys of all of them.
    """
    values = config.model_dump() | {"run_dir": run_dir}
    if "method.name" in params:
        values["method"] = with_method(config.method, params["method.name"])
    for key, value in params.items():
        if not _belongs_to_another_method(key, params.get("method.name")):
            set_value(values, key, value, source)
    return parse_config(values, source)


def with_method(method: Method, name: Any) -> dict[str, Any]:
    """The plain values of section `method` for the method called `name`, made from those of another.

    Keys that the two methods do not share take the default of the new one, see `lost_keys`.
    """
    values = method.model_dump()
    if name == method.name or name not in METHODS:  # an unknown name is refused when the config is validated
        return values | {"name": name}
    lost = lost_keys(type(method), METHODS[name])
    return {key: value for key, value in values.items() if key not in lost} | {"name": name}


def _belongs_to_another_method(key: str, name: Any) -> bool:
    section, _, leaf = key.partition(".")
    if section != "method" or name not in METHODS or leaf in METHODS[name].model_fields:
        return False
    return any(leaf in method.model_fields for method in METHODS.values())


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


def tampering_config(config: Config, tamper: TamperConfig, model: str, run_dir: str) -> Config:
    """The config that trains the model in folder `model` further, with the settings of section `tamper`.

    What decides where and in which precision it runs is that of section `train`.
    """
    train = {
        "lora": tamper.lora,
        "max_steps": tamper.steps,
        "learning_rate": tamper.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "global_batch_size": tamper.global_batch_size,
        "eval_fraction": 0.0,
        "metric_for_best_model": None,
        "load_best_model_at_end": False,
        "report_to": [],
    }
    changes = {
        "run_dir": run_dir,
        "model": config.model.model_copy(
            update={"name_or_path": model, "revision": None, "chat_template": None}
        ),
        "data": _tampering_data(config.data, tamper),
        "method": Sft(),
        "train": config.train.model_copy(update=train),
        "tamper": None,
    }
    return config.model_copy(update=changes)


def _tampering_data(data: DataConfig, tamper: TamperConfig) -> DataConfig:
    """The run's own pairs of safe queries, or those of `tamper.data` within the limits of `data`."""
    if tamper.data is None:
        return data.model_copy(update={"select": SelectConfig(group="safe")})
    limits = {name: getattr(data, name) for name in ("max_length", "max_prompt_length", "max_bad_fraction")}
    return DataConfig(path=[tamper.data], **limits)


def in_words_of_tamper(message: str) -> str:
    """A message about a config of `tampering_config` that names the keys that the user has set."""
    for key, own in {"data.": "tamper.data.", "train.lora.": "tamper.lora."}.items():
        if message.startswith(key):
            return own + message.removeprefix(key)
    return message
