"""Attack the run's own models: GCG, PAIR, best-of-n sampling or prefill, over a pool of workers.

    python -m pipelines.attack --config FILE [attack.name=best_of_n attack.limit=20 ...]

Measures how often an attack succeeds against the base model and the trained model of a run, by the run's
judge. Each request is committed once it is attacked: the same command after a kill makes what is missing.
Writes <run_dir>/attack/<kind>/<model>/summary.json and scores.parquet (ids and numbers), and the prompts as
artifacts in JailbreakBench's schema to <run_dir>/private/attack/<kind>/<model>/artifact.json, which
evaluate.jailbreak.paths reads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

from bdpo.cluster.status import StageStatus, count_shards
from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.evaluation.answers import EvaluatedModel, forget_failures, trained_model
from bdpo.evaluation.attacks.registry import attack_kind
from bdpo.evaluation.attacks.requests import asking_config, load_requests
from bdpo.evaluation.attacks.results import (
    AttackSummary,
    artifact,
    compare_attacks,
    public_scores,
    read_summary,
    summarise_attack,
    summary_facts,
)
from bdpo.evaluation.attacks.tables import attack_table, difference_line
from bdpo.evaluation.attacks.work import (
    Preparer,
    RequestAttacker,
    attack_fingerprint,
    prepared_store,
    record_store,
    state_folder,
)
from bdpo.evaluation.judges.registry import judge_label, judge_note
from bdpo.reports.cost import TimedStage, stage_gpus
from bdpo.storage.manifests import Fingerprint, Manifest, read_facts, write_manifest
from bdpo.storage.paths import StoragePath, read_parquet, sorted_glob, write_parquet, write_text
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import ShardStore
from pipelines.evaluate import warn_of_screen
from pipelines.runtime.cli import Command
from pipelines.runtime.judge_check import check_judge
from pipelines.runtime.pool import Executor, RayPool, ShardWork
from pipelines.runtime.progress import console
from pipelines.runtime.stage import ManifestStage, complete_all
from pipelines.train import OfTrainedModel

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check


@dataclass(frozen=True)
class AttackStage(ManifestStage):
    """An attack on one model of the run, by default the configured kind; `executor` is where, by default a
    pool."""

    executor: Executor | None = None
    begun_kind: str | None = None
    """The kind of an attack that was begun, whatever the config asks for now."""

    section = "attack"
    model_name = "base"

    @classmethod
    def found_in(cls, config: Config, run: RunDir) -> Sequence[Self]:
        """The attacks of every kind that were begun on this model."""
        begun = sorted_glob(run.private / "attack", f"*/{cls.model_name}")
        return [cls(config, run, begun_kind=folder.parent.name) for folder in begun]

    @property
    def kind(self) -> str:
        """The name of the attack."""
        return self.begun_kind or self.config.attack.name

    @property
    def name(self) -> str:
        """`attack gcg base`, for one."""
        return f"attack {self.kind} {self.model_name}"

    @property
    def applies(self) -> bool:
        """Whether the config asks for an attack on this model."""
        return self.config.attack.models in ("both", self.model_name)

    @property
    def folder(self) -> StoragePath:
        """Numbers of the attack."""
        return self.run.attack(self.kind, self.model_name)

    @property
    def manifest_file(self) -> StoragePath:
        """The summary."""
        return self.folder / "summary.json"

    @property
    def scores_file(self) -> StoragePath:
        """A row of numbers for each request."""
        return self.folder / "scores.parquet"

    @property
    def artifact_file(self) -> StoragePath:
        """Prompts and answers in JailbreakBench's schema: private."""
        return self._texts / "artifact.json"

    @property
    def _texts(self) -> StoragePath:
        return self.run.attack_texts(self.kind, self.model_name)

    def outputs(self) -> list[StoragePath]:
        """Numbers, records, state and artifact."""
        return [self.folder, self._texts]

    @cached_property
    def model(self) -> EvaluatedModel:
        """The model that is attacked."""
        return EvaluatedModel(self.config.model)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Model, requests, attack and judge."""
        return attack_fingerprint(self.config, self.model)

    def has_results(self, manifest: Manifest) -> bool:
        """Whether enough requests have a verdict, all numbers are there, and the artifact is.

        A summary of fewer numbers, of an older version, is made again from the records.
        """
        whole = bool(manifest["valid"]) and AttackSummary.__dataclass_fields__.keys() <= manifest.keys()
        return whole and self.artifact_file.is_file() and self.scores_file.is_file()

    def make(self) -> Manifest:
        """Attack, write the artifact, summarise."""
        started = time.perf_counter()
        requests = load_requests(self.config)
        records = record_store(self.run, self.kind, self.model_name, self.fingerprint)
        forget_failures(records)
        self._work(records, len(requests))
        table = records.read()
        own = artifact(self.config, f"{self._target_name()}-{self.model_name}", requests, table)
        write_text(self.artifact_file, own, 0o600)
        scores = public_scores(table, requests)
        write_parquet(self.scores_file, scores)
        prepared = attack_kind(self.config).prepares(self.config)
        summary = summarise_attack(scores, judge_label(self.config), universal=prepared)
        facts = summary_facts(summary) | {"seed": self.config.seed, "artifact": str(self.artifact_file)}
        facts |= {"seconds": time.perf_counter() - started, "gpus": stage_gpus(self.config.attack)}
        return write_manifest(self.manifest_file, self.fingerprint, **facts)

    def _work(self, records: ShardStore, total: int) -> None:
        """What is made once for all requests, then every request."""
        executor = self.executor or RayPool.of("attack", self.config.attack)
        arguments = {"config": self.config, "model": self.model}
        arguments["state"] = state_folder(self.run, self.kind, self.model_name)
        if attack_kind(self.config).prepares(self.config):
            once = prepared_store(self.run, self.kind, self.model_name, self.fingerprint)
            arguments["store"] = once
            executor.complete_shards(ShardWork(f"prepare {self.name}", Preparer, dict(arguments), once, 1, 1))
        arguments["store"] = records
        executor.complete_shards(ShardWork(self.name, RequestAttacker, arguments, records, total, 1))

    def _target_name(self) -> str:
        """The last part of the model's name: by it artifacts distinguish the base from the trained model."""
        return self.config.model.name_or_path.rstrip("/").rpartition("/")[2]

    def status(self) -> StageStatus:
        """Requests so far."""
        _, requests = count_shards(self._texts / "records")
        valid = read_facts(self.manifest_file).get("valid")
        return StageStatus.of(self.name, bool(valid), requests > 0, requests=requests, valid=valid)

    def input_checks(self) -> Mapping[str, Check]:
        """Model, requests, attack and judge can be used."""
        from bdpo.cluster.preflight import check_model

        return {"model": check_model, "attack": check_attack}

    def further_checks(self) -> Mapping[str, Check]:
        """The attack, if the config has one."""
        return {"attack": check_attack} if "attack" in self.config.model_fields_set else {}

    def timed(self, name: str | None = None) -> TimedStage:
        """With the GPUs that it held: the section may be another attack's by now."""
        timed = super().timed(name)
        return replace(timed, gpus=read_facts(self.manifest_file).get("gpus", timed.gpus))

    def summary(self) -> AttackSummary:
        """The numbers of a finished attack."""
        return read_summary(self.ensure_manifest())


class AttackBase(AttackStage):
    """The attack on the model that the config names."""


class AttackTrained(OfTrainedModel, AttackStage):
    """The attack on the run's own model."""

    model_name = "trained"

    @cached_property
    def model(self) -> EvaluatedModel:
        """The model that is trained in the run folder."""
        return trained_model(self.config, self.run)


ATTACKS: tuple[type[AttackStage], ...] = (AttackBase, AttackTrained)


def _require_model(config: Config, run: RunDir) -> None:
    if config.attack.models == "trained" and not run.has_model():
        raise UserError(f"attack.models=trained: {run.model} is not there; train the run first")


def check_attack(config: Config, run: RunDir) -> str:
    """Requests can be read, the attack can be made, and the judge can judge them."""
    requests = load_requests(config)
    attack_kind(config).check(config)
    check_judge(asking_config(config), run)
    return f"{config.attack.name} on {len(requests)} requests of {config.attack.benchmark}"


def run_attack(config: Config, run: RunDir) -> None:
    """Attack the models that exist, and compare."""
    stages = [stage(config, run) for stage in ATTACKS]
    warn_of_screen(asking_config(config))
    done = [stage for stage in complete_all(stages) if isinstance(stage, AttackStage)]
    if config.attack.models == "both" and not run.has_model():
        console.print("the run has no trained model: the base alone is attacked", style="yellow")
    print_attacks(config, done)


def print_attacks(config: Config, stages: list[AttackStage]) -> None:
    """The numbers of finished attacks, and the paired difference of two."""
    judge = judge_note(config)
    summaries = {stage.model_name: stage.summary() for stage in stages}
    console.print(attack_table(config.attack.name, summaries, judge))
    if len(stages) == 2 and all(summary.valid for summary in summaries.values()):
        first, second = (read_parquet(stage.scores_file) for stage in stages)
        difference = compare_attacks(first, second)
        if difference is not None:
            console.print(difference_line(difference, judge), soft_wrap=True)
    for stage in stages:
        console.print(f"artifact  {stage.artifact_file}", soft_wrap=True, markup=False)


main = Command(__doc__, ATTACKS, run_attack, requires=_require_model)

if __name__ == "__main__":
    main()
