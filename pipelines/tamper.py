"""Tamper test: a few LoRA steps on benign data after the alignment, and the evaluation again.

    python -m pipelines.tamper --config my.yaml tamper.steps=50 [section.key=value ...]

Requires the trained model of the run folder, which stays as it is. Trains it further in <run_dir>/tamper, a
run folder of its own, and evaluates the result as `tampered` beside it. `pipelines.run` does the same where
its config has a section `tamper`. The same command after a kill resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from bdpo.cluster.status import StageStatus
from bdpo.config import Config, TamperConfig
from bdpo.config.derive import in_words_of_tamper, tampering_config
from bdpo.errors import UserError
from bdpo.evaluation.answers import EvaluatedModel, trained_model
from bdpo.storage.manifests import Fingerprint, Manifest
from bdpo.storage.paths import StoragePath
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import Evaluate, EvaluateBase, EvaluateTrained, print_evaluations
from pipelines.prepare import Prepare
from pipelines.runtime.cli import Command
from pipelines.runtime.stage import ManifestStage, Stage, complete_all
from pipelines.train import OfTrainedModel, Train

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check


class OfTamperTest(Stage):
    """A stage of the tamper test."""

    @property
    def applies(self) -> bool:
        """Whether the config asks for a tamper test."""
        return self.config.tamper is not None


class Tamper(OfTamperTest, OfTrainedModel, ManifestStage):
    """Trains the aligned model on benign data, in a folder of its own."""

    name = "tamper"
    section = "train"

    @cached_property
    def training(self) -> Train:
        """The training, with the config and the folder of its own."""
        tamper = self.config.tamper or TamperConfig()
        folder = self.run.tampering(own_data=tamper.data is not None)
        config = tampering_config(self.config, tamper, str(self.run.model), str(folder.root))
        return Train(config, folder)

    @property
    def manifest_file(self) -> StoragePath:
        """The manifest of the training."""
        return self.training.manifest_file

    def outputs(self) -> list[StoragePath]:
        """The folder of the training, and its quarantined rows."""
        return [self.training.run.root, self.training.run.private]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The aligned model, the pairs and the training."""
        return self.training.fingerprint

    def has_results(self, manifest: Manifest) -> bool:
        """Whether the model exists."""
        return self.training.has_results(manifest)

    def make(self) -> Manifest:
        """Train from the newest intact checkpoint to the end."""
        return self.training.make()

    def complete(self) -> Manifest:
        """Prepare data of its own, and train, unless that is done; returns the manifest of the training."""
        training = self.training
        with _keys_of_tamper():
            training.run.record(training.config)
            if training.run.data != self.run.data:
                Prepare(training.config, training.run).complete()
            return training.complete()

    def status(self) -> StageStatus:
        """Steps and checkpoints of the training."""
        return replace(self.training.status(), stage=self.name)

    def input_checks(self) -> Mapping[str, Check]:
        """The data can be read, and the adapters fit the model."""
        from bdpo.cluster.preflight import check_tamper

        return {"tamper": check_tamper} if self.applies else {}


@dataclass(frozen=True)
class EvaluateTampered(OfTamperTest, Evaluate):
    """The run's own model after the tamper test."""

    model_name: str = "tampered"
    model_from = Tamper
    trained_on_pairs = True

    @property
    def has_inputs(self) -> bool:
        """Whether the model of the tamper test is trained."""
        return self._folder.has_model()

    @cached_property
    def model(self) -> EvaluatedModel:
        """The model of the tamper test."""
        return trained_model(self.config, self._folder)

    @property
    def _folder(self) -> RunDir:
        """The run folder of the tamper test; where its pairs lie makes no difference to the model."""
        return self.run.tampering(own_data=False)


@contextmanager
def _keys_of_tamper() -> Iterator[None]:
    """What is wrong is named by the keys of section `tamper`."""
    try:
        yield
    except UserError as error:
        raise UserError(in_words_of_tamper(str(error))) from None


STAGES = (Tamper, EvaluateBase, EvaluateTrained, EvaluateTampered)


def require_aligned_model(config: Config, run: RunDir) -> None:
    """Make sure that there is something to tamper with.

    Raises:
        UserError: the config has no section `tamper`, or there is no trained model.
    """
    if config.tamper is None:
        raise UserError("tamper: the config has no such section; tamper={} takes the defaults")
    if not run.has_model():
        raise UserError(f"{run.model}: no trained model; run `python -m pipelines.run` first")


def run_tamper(config: Config, run: RunDir) -> None:
    """Tamper with the trained model, evaluate it, and print it beside the aligned one."""
    print_evaluations(complete_all(stage(config, run) for stage in STAGES))


main = Command(
    __doc__, STAGES, run_tamper, requires=require_aligned_model, keeps=(EvaluateBase, EvaluateTrained)
)

if __name__ == "__main__":
    main()
