"""The configuration of a run: typed sections, YAML, dotted overrides; one module a section.

Order of precedence: the defaults here < the YAML file < `section.key=value` overrides. Unknown keys
and wrong types are refused with the key's full path. The resolved config is saved in the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from bdpo.config.attack import AnyAttack, BestOfNConfig
from bdpo.config.base import SANDBOX, worker_range, workers_label
from bdpo.config.data import DataConfig
from bdpo.config.evaluate import EvaluateConfig
from bdpo.config.experiment import ExperimentConfig
from bdpo.config.explain import explain, one_of
from bdpo.config.kinds import change_kind, written_out
from bdpo.config.model import ModelConfig
from bdpo.config.reading import Dumper, parse_override, read_yaml, require_tree, set_value, short
from bdpo.config.score import ScoreConfig
from bdpo.config.secrets import refuse_secrets
from bdpo.config.tamper import TamperConfig
from bdpo.config.train import LoraConfig, TrainConfig
from bdpo.config.tune import Range, TuneConfig
from bdpo.errors import UserError
from bdpo.method.losses import AnyMethod, Bdpo
from bdpo.method.mi import reestimate_of
from bdpo.section import Section

__all__ = [
    "SANDBOX",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "LoraConfig",
    "ModelConfig",
    "Range",
    "ScoreConfig",
    "TamperConfig",
    "TrainConfig",
    "TuneConfig",
    "load_config",
    "parse_config",
    "recorded_config",
    "worker_range",
    "workers_label",
]


class Config(Section):
    """Everything about one run. `run_dir` holds all that it makes."""

    run_dir: str = Field(description="folder, also on s3:// or gs://, that holds all that the run makes")
    seed: int = Field(0, ge=0, lt=2**32, description="of the sample of pairs, their order and the training")
    model: ModelConfig
    data: DataConfig
    score: ScoreConfig = ScoreConfig()
    method: AnyMethod = Bdpo()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tamper: TamperConfig | None = Field(
        None, description="a tamper test after the alignment; {} has defaults"
    )
    attack: AnyAttack = BestOfNConfig()
    tune: TuneConfig = TuneConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    fresh: bool = Field(False, exclude=True, description="discard what the run folder holds, start over")

    @model_validator(mode="after")
    def _masters_are_float32(self) -> Config:
        if self.train.zero_stage == 0 and self.model.dtype != "float32":
            raise ValueError(
                "train.zero_stage=0 requires model.dtype=float32: DeepSpeed keeps float32 master weights of "
                "a bfloat16 model from stage 1 on"
            )
        return self

    @model_validator(mode="after")
    def _best_is_logged(self) -> Config:
        given, logged = self.train.metric_for_best_model, ("loss", *self.method.metrics)
        if given and given.removeprefix("eval_") not in logged:
            raise ValueError(
                f"train.metric_for_best_model: with method.name={self.method.name} {one_of(logged, given)}"
            )
        return self

    @model_validator(mode="after")
    def _mutual_information_is_estimated_again(self) -> Config:
        reestimate, train = reestimate_of(self.method), self.train
        only_epoch = train.num_train_epochs == 1 and train.max_steps is None
        if reestimate and reestimate.every == "epoch" and only_epoch:
            raise ValueError(
                "method.reestimate.every=epoch requires train.num_train_epochs above 1, being before each "
                "epoch but the first; or set a number of steps"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load_config` reads back."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay dotted overrides over it, and validate.

    Raises:
        UserError: one line that names the file, or the override that is wrong, and the key, with the
            nearest known key.
    """
    values = read_yaml(Path(file))
    for override in overrides:
        _lay_over(values, override)
    try:
        return parse_config(values, str(file))
    except UserError as error:
        raise _blamed(error, Path(file), overrides) from None


def _lay_over(values: dict[str, Any], override: str) -> None:
    """Lay one override over plain values, in place; a changed `method.name` takes out its former keys."""
    key, value = parse_override(override)
    key = written_out(values, key, value, Config)
    *path, leaf = key.split(".")
    if leaf == "name":
        change_kind(values, path, value, Config)
    set_value(values, key, value)


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate plain values that a user wrote; `source` is what an error message names."""
    require_tree(values, source)
    refuse_secrets(values, source)
    return recorded_config(values, source)


def recorded_config(values: dict[str, Any], source: str) -> Config:
    """Validate plain values that a command wrote: they were searched for secrets, which is slow, before."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, Config)}") from None


def _blamed(error: UserError, file: Path, overrides: Sequence[str]) -> UserError:
    """The error with the name of the override that brought it about, if the file alone does not have it."""
    values, message = read_yaml(file), str(error)
    for override in ["", *overrides]:
        if override:
            _lay_over(values, override)
        try:
            parse_config(values, str(file))
        except UserError as found:
            if str(found) == message:
                source = f"override {short(override.partition('=')[0])}" if override else str(file)
                return UserError(source + message.removeprefix(str(file)))
    return error
