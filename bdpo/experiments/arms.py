"""The arms of an experiment: the config, seed and folder of each of its trainings."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field

from bdpo.config import Config, recorded_config
from bdpo.config.derive import Params, trial_config, value_at
from bdpo.errors import UserError
from bdpo.evaluation.answers import trained_model
from bdpo.storage.manifests import read_manifest, write_manifest
from bdpo.storage.paths import StoragePath, sorted_glob
from bdpo.storage.run_dir import RunDir, run_config

_CONTEXT = "context-"

RECORD = "experiment.json"


@dataclass(frozen=True)
class Arm:
    """One line of a table: its name, and dotted keys of the config with the values that they take."""

    name: str
    params: Params = field(default_factory=dict)


@dataclass(frozen=True)
class ExperimentRecord:
    """What an experiment was last run with: `<run_dir>/experiments/<name>/experiment.json`.

    `arms` are the arms as they were trained, `trials` those of the search for their learning rates, `notes`
    what a reader of the results has to know.
    """

    config: Config
    arms: tuple[Arm, ...]
    trials: tuple[Arm, ...] = ()
    notes: tuple[str, ...] = ()

    def write(self, folder: StoragePath) -> None:
        """Write the record into the folder of the experiment."""
        arms = {name: [asdict(arm) for arm in getattr(self, name)] for name in ("arms", "trials")}
        write_manifest(folder / RECORD, {}, config=self.config.model_dump(), **arms, notes=self.notes)

    @classmethod
    def read(cls, folder: StoragePath) -> ExperimentRecord:
        """Read the record in the folder of an experiment.

        Raises:
            UserError: there is none; the experiment was never run.
        """
        file = folder / RECORD
        values = read_manifest(file)
        if values is None:
            command = f"python -m pipelines.experiment {folder.name}"
            raise UserError(f"{file}: not found; run `{command}` first")
        arms, trials = (tuple(Arm(**arm) for arm in values[name]) for name in ("arms", "trials"))
        return cls(recorded_config(values["config"], str(file)), arms, trials, tuple(values["notes"]))


def as_method(config: Config, name: str) -> Config:
    """The config of the run with another method, see `bdpo.config.derive.with_method`."""
    return trial_config(config, {"method.name": name}, config.run_dir)


def method_params(name: str, config: Config) -> Params:
    """A method with the settings of the run where it has them."""
    return {"method.name": name, "method.beta": value_at(as_method(config, name), "method.beta")}


def arm_run(config: Config, run: RunDir, arm: Arm, seed: int) -> tuple[Config, RunDir]:
    """The config and the run folder of an arm at a seed.

    The pairs are those of the run; so are the scores, unless the arm has another unconditional context.
    """
    folder = run.part("experiments", _on_part("arms", config), arm_folder(config, arm), f"seed-{seed}")
    settings = trial_config(config, arm.params, str(folder.root), f"arm {arm.name}")
    if settings.score.unconditional != config.score.unconditional:
        folder = folder.with_scores(context_scores(run, settings.score.unconditional))
    return settings.model_copy(update={"seed": seed}), folder


def arm_folder(config: Config, arm: Arm) -> str:
    """`bdpo-alpha-2.0`: the method, and every key in which the arm differs from the run with that method."""
    method: str = arm.params["method.name"]
    unchanged, settings = as_method(config, method), trial_config(config, arm.params, config.run_dir)
    changed = [
        f"{key.rpartition('.')[2]}-{json.dumps(value)}"
        for key, value in arm.params.items()
        if value_at(settings, key) != value_at(unchanged, key)
    ]
    return re.sub(r"[^A-Za-z0-9._+]+", "-", "-".join([method, *changed])).replace("+", "").strip("-")


def base_run(config: Config, run: RunDir) -> RunDir:
    """The folder of the base model's evaluation: the run, or a folder of its own on a part of the prompts."""
    return run if config.evaluate.part == "all" else run.part("experiments", _on_part("base", config))


def _on_part(name: str, config: Config) -> str:
    """The name of a folder; evaluations on a part of the prompts have folders of their own."""
    part = config.evaluate.part
    return name if part == "all" else f"{name}-{part}"


def run_at(root: StoragePath) -> RunDir:
    """The run folder at a path; the folder of an arm or a trial has the pairs of the run around it."""
    if (root / "data").is_dir():
        return RunDir(root)
    names, around = [root.name], root.parent
    while around.name not in ("", "experiments", "tune"):
        names.insert(0, around.name)
        around = around.parent
    if not (around.name and (around.parent / "config.yaml").is_file()):
        return RunDir(root)
    run = RunDir(around.parent)
    part = run.part(around.name, *names)
    context = run_config(part).score.unconditional
    if context != run_config(run).score.unconditional:
        return part.with_scores(context_scores(run, context))
    return part


def context_scores(run: RunDir, context: str) -> StoragePath:
    """The scores of a run's pairs with another unconditional context than the run's."""
    return run.root / "experiments" / f"{_CONTEXT}{context}" / "scores"


def experiment_results(run: RunDir, name: str) -> list[StoragePath]:
    """All outputs of an experiment, those included that it shares with the run and with other experiments."""
    shared = [
        folder
        for experiments in (run.root / "experiments", run.private / "experiments")
        for kind in (_CONTEXT, "arms", "base")
        for folder in sorted_glob(experiments, f"{kind}*")
    ]
    own = run.part("experiments", name).root
    base = [run.eval("base"), run.responses("base"), run.replies("base")]
    return [run.data, run.scores, *base, *shared, own]


def rescored(config: Config, run: RunDir) -> tuple[Config, RunDir]:
    """The config and the folder with which the trained model of an arm scores the pairs of the run."""
    trained = trained_model(config, run).model
    return config.model_copy(update={"model": trained}), run.with_scores(run.root / "rescored")
