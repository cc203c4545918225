"""A stage of the pipeline: one declaration, from which the commands derive all that they do with it.

What a stage declares is its name, what decides its results, the files that it makes, how it is done and how
far it is. Derived from that are resuming and refusing (`complete`), `fresh=true` (`outputs`), `status`, the
checks of `preflight` and of a command's beginning, `--inspect`, `--dry-run`, and the costs on a page. Another
stage is a module with its class, and a line in `pipelines.runtime.stages`.

Importing a stage is cheap: torch, transformers, Ray and DeepSpeed are imported where they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bdpo.cluster.status import StageStatus
from bdpo.config import Config
from bdpo.reports.cost import TimedStage, stage_gpus
from bdpo.storage.manifests import Fingerprint, Manifest, finished, read_manifest
from bdpo.storage.paths import StoragePath
from bdpo.storage.run_dir import RunDir

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check


@dataclass(frozen=True)
class Stage(ABC):
    """A stage of the run in a folder, with its config."""

    config: Config
    run: RunDir

    section: ClassVar[str | None] = None
    """The section of the config with the workers and GPUs of the stage; None: on none."""

    model_from: ClassVar[type[Stage] | None] = None
    """The stage that trains the model that this one works on; None: it requires no trained model."""

    @classmethod
    def found_in(cls, config: Config, run: RunDir) -> Sequence[Self]:
        """The stages of this class that a run folder shows: the one, if it applies."""
        stage = cls(config, run)
        return [stage] if stage.applies else []

    @property
    @abstractmethod
    def name(self) -> str:
        """What users know the stage by."""

    @property
    def applies(self) -> bool:
        """Whether the config asks for this stage."""
        return True

    @property
    def has_inputs(self) -> bool:
        """Whether the model that the stage works on exists; else a command for several models omits it."""
        return True

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do but to compare the inputs with those of the results."""
        return False

    @abstractmethod
    def outputs(self) -> list[StoragePath]:
        """Files and folders that the stage makes: what `fresh=true` discards."""

    @abstractmethod
    def complete(self) -> Any:
        """Do what is missing; nothing if the stage is done.

        Raises:
            UserError: the stage was done, or begun, with other inputs; the message names the first of them.
        """

    @abstractmethod
    def status(self) -> StageStatus:
        """How far the stage is, read from the run folder alone."""

    def inspect(self) -> None:
        """What `--inspect` does: show the finished results, run nothing."""
        raise NotImplementedError

    def dry_run(self) -> None:
        """What `--dry-run` does: print what the stage would need; there need be no run folder."""
        raise NotImplementedError

    def input_checks(self) -> Mapping[str, Check]:
        """What must hold before anything is done, here or by a stage before this one.

        `preflight` looks at those of the pipeline.
        """
        return {}

    def further_checks(self) -> Mapping[str, Check]:
        """What `preflight` looks at besides `input_checks`."""
        return {}


class ManifestStage(Stage):
    """A stage that writes a manifest, last, with the fingerprint of its inputs."""

    @property
    @abstractmethod
    def manifest_file(self) -> StoragePath:
        """The file that marks the stage as done."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Everything that the results depend on, field by field; what is not in it may change any time."""

    @abstractmethod
    def make(self) -> Manifest:
        """Do what is missing, then write the manifest; returns it."""

    def has_results(self, manifest: Manifest) -> bool:
        """Whether the results of the manifest are there and valid, as far as the run folder shows at once."""
        return True

    def is_intact(self, manifest: Manifest) -> bool:
        """Whether they are unharmed as well; a stage that compares more than `has_results` overrides it."""
        return self.has_results(manifest)

    def recorded(self) -> Manifest | None:
        """The manifest if the stage is done, with whatever inputs: what `status` reports, and reads no input.

        Wherever `finished` returns a manifest, this does.
        """
        manifest = read_manifest(self.manifest_file)
        return manifest if manifest is not None and self.has_results(manifest) else None

    @property
    def is_done(self) -> bool:
        """Whether there is a manifest, and its results are there."""
        return self.recorded() is not None

    def finished(self) -> Manifest | None:
        """The manifest if the stage is done with these inputs, None if it is not done.

        Raises:
            UserError: it was done with other inputs; the message names the first field that differs.
        """
        manifest = finished(self.manifest_file, self.fingerprint)
        return manifest if manifest is not None and self.is_intact(manifest) else None

    def ensure_manifest(self) -> Manifest:
        """The manifest; what is missing is done first."""
        manifest = self.finished()
        return self.make() if manifest is None else manifest

    def complete(self) -> Any:
        """Do what is missing; returns the manifest, unless a stage overrides this."""
        return self.ensure_manifest()

    def timed(self, name: str | None = None) -> TimedStage:
        """The file with its seconds, and the most GPUs that it holds at a time; `name` is for tables."""
        section = getattr(self.config, self.section) if self.section else None
        return TimedStage(name or self.name, self.manifest_file, stage_gpus(section) if section else 0.0)


def complete_all(stages: Iterable[Stage]) -> list[Stage]:
    """Complete the stages that apply and have their inputs, in order; returns those."""
    completed = []
    for stage in stages:
        if stage.applies and stage.has_inputs:  # asked one by one: a stage may make the inputs of the next
            stage.complete()
            completed.append(stage)
    return completed


def input_checks(stages: Iterable[Stage]) -> dict[str, Check]:
    """The input checks of some stages, each once."""
    return {name: check for stage in stages for name, check in stage.input_checks().items()}


def check_inputs(stages: Sequence[Stage]) -> None:
    """Make sure that the inputs of a command's stages can be used, before anything is discarded or begun.

    If all of the stages are done nothing is begun, and each compares its inputs itself.

    Raises:
        UserError: one of them cannot.
    """
    config, run = stages[0].config, stages[0].run
    ahead = stages_ahead(stages)
    if config.fresh or any(not stage.is_done and stage.input_checks() for stage in ahead):
        for check in input_checks(ahead).values():
            check(config, run)


def stages_ahead(stages: Iterable[Stage]) -> list[Stage]:
    """Those of a command's stages that `complete_all` will complete, as far as is known before the first.

    They apply, and the model that they work on exists, or one of the stages before them trains it.
    """
    ahead: list[Stage] = []
    for stage in stages:
        trained = stage.model_from is not None and any(isinstance(one, stage.model_from) for one in ahead)
        if stage.applies and (trained or stage.has_inputs):
            ahead.append(stage)
    return ahead


def outputs_of(stages: Iterable[Stage]) -> list[StoragePath]:
    """What some stages make."""
    return [path for stage in stages for path in stage.outputs()]
