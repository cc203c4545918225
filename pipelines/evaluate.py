"""Safety evaluation: Ray Data generates answers over a pool of models, then judges them.

    python -m pipelines.evaluate --config pipelines/configs/sandbox.yaml [section.key=value ...]
    python -m pipelines.evaluate --compare runs/a runs/b [runs/c ...]

Evaluates the base model, an adapter over it (evaluate.adapter) and, if the run folder has one, the
trained model. Writes <run_dir>/eval/<name>/scores.parquet (ids and numbers) and summary.json; the answers
lie under <run_dir>/private. The same command after a kill generates only what is missing.

--compare sets finished runs side by side, with paired differences and p-values: the first run's base, then
each run's trained model (else its adapter, else its base). A column is called <run>/<model>.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING

from bdpo.cluster.status import StageStatus, count_shards
from bdpo.config import Config
from bdpo.data.pairs import last_turns
from bdpo.evaluation.answers import (
    EvaluatedModel,
    ShardAnswerer,
    ShardJudge,
    answer_store,
    answers_fingerprint,
    forget_failures,
    measure_capability,
    planned_items,
    reply_store,
    trained_model,
    verdict_store,
)
from bdpo.evaluation.capability import NOT_RUN, capability_fingerprint, harness_version, read_result
from bdpo.evaluation.compare import compare_all
from bdpo.evaluation.judges.registry import NOBODY, JudgeNote, judge_kind, judge_note
from bdpo.evaluation.measures import Summary, summarise
from bdpo.evaluation.reference import ShardReference, logp_store, reference_fingerprint, with_logps
from bdpo.evaluation.results import (
    chosen_models,
    is_valid,
    missing_capability,
    read_evaluation,
    unlike_models,
)
from bdpo.evaluation.tables import (
    comparison_table,
    difference_table,
    invalid_lines,
    note_lines,
    screen_warning,
)
from bdpo.evaluation.twins import count_near_twins
from bdpo.storage.manifests import Fingerprint, Manifest, finished, read_facts, write_manifest
from bdpo.storage.paths import StoragePath, write_parquet
from bdpo.storage.run_dir import RunDir
from pipelines.runtime.cli import Command, exit_codes
from pipelines.runtime.cluster import connect, require_capacity
from pipelines.runtime.pool import Executor, RayPool, ShardWork
from pipelines.runtime.progress import console, progress_bar
from pipelines.runtime.stage import ManifestStage, Stage, complete_all
from pipelines.runtime.stalls import watched_tasks
from pipelines.train import OfTrainedModel

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check


@dataclass(frozen=True)
class Evaluate(ManifestStage):
    """Asks one model every prompt, and judges its answers; `executor` is where, by default a pool.

    The model is the one that is trained in the run folder, under any name, as that of a rung; a class for
    another model declares it.
    """

    model_name: str
    executor: Executor | None = None

    section = "evaluate"
    trained_on_pairs = False

    @property
    def name(self) -> str:
        """`evaluate base`, for one."""
        return f"evaluate {self.model_name}"

    @property
    def folder(self) -> StoragePath:
        """Verdicts, summary and capability of the model."""
        return self.run.eval(self.model_name)

    @property
    def manifest_file(self) -> StoragePath:
        """The summary."""
        return self.folder / "summary.json"

    def outputs(self) -> list[StoragePath]:
        """Verdicts, answers, and what a judge wrote about them."""
        return [self.folder, self.run.responses(self.model_name), self.run.replies(self.model_name)]

    @cached_property
    def model(self) -> EvaluatedModel:
        """The model that is asked."""
        return trained_model(self.config, self.run)

    @cached_property
    def _answers(self) -> Fingerprint:
        return answers_fingerprint(self.config, self.model)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Model, prompts, how they are answered, and the judge."""
        judged = verdict_store(self.config, self.run, self.model_name, self._answers).fingerprint
        return {**judged, **reference_fingerprint(self.config)}

    def has_results(self, manifest: Manifest) -> bool:
        """Whether enough verdicts were given; else the judge is asked again for those that are missing."""
        return is_valid(self.folder)

    def complete(self) -> Summary:
        """Evaluate the model unless that is done and valid; returns its summary, capability included."""
        if self.config.evaluate.capability:
            harness_version()  # before the hours of everything else
        manifest = self.ensure_manifest()
        capability = {name: read_result(result) for name, result in self._capability().items()}
        return replace(Summary.from_json(manifest), capability=capability)

    def ensure_manifest(self) -> Manifest:
        """The manifest, with the judge's own error as it is known now: nobody is asked again for it."""
        manifest, error = super().ensure_manifest(), dict(judge_note(self.config).reach)
        if manifest.get("judge_error") == error:
            return manifest
        return write_manifest(
            self.manifest_file, manifest.fingerprint, **{**manifest.facts, "judge_error": error}
        )

    def make(self) -> Manifest:
        """Answer, judge, summarise."""
        started = time.perf_counter()
        answers = answer_store(self.run, self.model_name, self._answers)
        scores = verdict_store(self.config, self.run, self.model_name, self._answers)
        evaluate, total = self.config.evaluate, len(planned_items(self.config))
        executor = self.executor or RayPool.of("evaluate", evaluate)
        to_answer = {"config": self.config, "model": self.model, "store": answers}
        replies = reply_store(self.run, self.model_name, scores.fingerprint)
        to_judge = {"config": self.config, "answers": answers, "scores": scores, "replies": replies}
        name, rows = self.model_name, evaluate.batch_size
        executor.complete_shards(ShardWork(f"answer {name}", ShardAnswerer, to_answer, answers, total, rows))
        forget_failures(scores)
        kind = judge_kind(self.config)
        judge = executor if kind.has_model else executor.without_model()
        longest = kind.longest(self.config, rows)
        judge.complete_shards(ShardWork(f"judge {name}", ShardJudge, to_judge, scores, total, rows, longest))
        table = scores.read().sort_by("item_id")
        if evaluate.reference_logps:
            logps = logp_store(self.config, self.run, name, self._answers)
            to_forward = {"config": self.config, "answers": answers, "logps": logps}
            title = f"log-probs of {name}"
            executor.complete_shards(ShardWork(title, ShardReference, to_forward, logps, total, rows))
            table = with_logps(table, logps.read())
        write_parquet(self.folder / "scores.parquet", table)
        seconds = time.perf_counter() - started
        summary = summarise(table).to_json()
        if self.trained_on_pairs:  # what it was trained on it may know by heart
            twins = count_near_twins(planned_items(self.config), last_turns(self.run.pairs))
            summary["near_twins"] = twins
        return write_manifest(self.manifest_file, self.fingerprint, seconds=seconds, **summary)

    def status(self) -> StageStatus:
        """Answers and verdicts so far."""
        _, answers = count_shards(self.run.responses(self.model_name))
        _, verdicts = count_shards(self.folder / "shards")
        valid = read_facts(self.manifest_file).get("valid")
        missing = missing_capability(self.folder, self.config.evaluate.capability)
        done = self.recorded() is not None and not missing
        begun = answers + verdicts > 0
        return StageStatus.of(self.name, done, begun, answers=answers, verdicts=verdicts, valid=valid)

    def input_checks(self) -> Mapping[str, Check]:
        """The model can be read, every configured benchmark has its prompts, and the judge can judge them."""
        from bdpo.cluster.preflight import check_benchmarks, check_model
        from pipelines.runtime.judge_check import check_judge

        checks: dict[str, Check] = {"model": check_model, "benchmarks": check_benchmarks}
        if self.config.fresh or not self.is_done:  # of what is done nobody is asked again
            checks["judge"] = check_judge
        return checks

    @property
    def _capability_files(self) -> dict[str, StoragePath]:
        """Benchmark -> its result."""
        folder = self.folder / "capability"
        return {name: folder / f"{name}.json" for name in self.config.evaluate.capability}

    def _capability(self) -> dict[str, Manifest]:
        """Each capability benchmark, run unless that is done; one that was not run is tried again."""
        evaluate = self.config.evaluate
        if not evaluate.capability:
            return {}
        fingerprint = capability_fingerprint(self._answers, evaluate.limit, evaluate.capability_files)
        files = self._capability_files
        found = {name: finished(file, fingerprint) for name, file in files.items()}
        done = {name: result for name, result in found.items() if result and NOT_RUN not in result}
        missing = [benchmark for benchmark in files if benchmark not in done]
        if missing:
            connect()
            gpus = evaluate.gpus_per_worker
            require_capacity("evaluate", 1, gpus)
            title, device = f"capability {self.model_name}", "cuda" if gpus else "cpu"
            calls = {name: (self.config, self.model, name, device) for name in missing}
            tasks = watched_tasks(title, measure_capability, calls, gpus, evaluate.stall_seconds)
            with progress_bar(title, len(missing)) as advance:
                for benchmark, result in tasks:
                    done[benchmark] = write_manifest(files[benchmark], fingerprint, **asdict(result))
                    advance(1, benchmark)
        return done


@dataclass(frozen=True)
class EvaluateBase(Evaluate):
    """The model that the config names."""

    model_name: str = "base"

    @cached_property
    def model(self) -> EvaluatedModel:
        """The model of section `model`."""
        return EvaluatedModel(self.config.model)


@dataclass(frozen=True)
class EvaluateAdapter(Evaluate):
    """Evaluates that model with the adapter of `evaluate.adapter` over it."""

    model_name: str = "adapter"

    @property
    def applies(self) -> bool:
        """Whether an adapter is named."""
        return self.config.evaluate.adapter is not None

    @cached_property
    def model(self) -> EvaluatedModel:
        """The model of section `model` with the adapter."""
        return EvaluatedModel(self.config.model, self.config.evaluate.adapter)

    def input_checks(self) -> Mapping[str, Check]:
        """Those of each evaluation, and the adapter fits the model."""
        from bdpo.cluster.preflight import check_evaluated_adapter

        return {**super().input_checks(), "adapter": check_evaluated_adapter}


@dataclass(frozen=True)
class EvaluateTrained(OfTrainedModel, Evaluate):
    """The run's own model."""

    model_name: str = "trained"
    trained_on_pairs = True


MODELS = (EvaluateBase, EvaluateAdapter, EvaluateTrained)


def run_evaluate(config: Config, run: RunDir) -> None:
    """Evaluate the models that exist, and print the comparison."""
    stages = [stage(config, run) for stage in MODELS]
    print_evaluations(complete_all(stages))


def warn_of_screen(config: Config) -> None:
    """Say that a screen judges forbidden requests, before hours are spent on its numbers."""
    if warning := screen_warning(config):
        console.print(warning, style="yellow", soft_wrap=True)


def run_compare(roots: list[str]) -> None:
    """Print finished evaluations side by side.

    Raises:
        UserError: a run has no finished evaluation, or they answered other prompts or had other judges.
    """
    chosen = chosen_models(roots)
    print_comparison(chosen)
    if unlike := unlike_models(chosen):
        console.print(unlike, style="yellow", soft_wrap=True)


def print_evaluations(stages: Iterable[Stage]) -> None:
    """The comparison of the models that stages have evaluated."""
    print_comparison({stage.model_name: stage.folder for stage in stages if isinstance(stage, Evaluate)})


def print_comparison(folders: Mapping[str, StoragePath]) -> None:
    """The models' numbers, then their paired differences; `folders` are <run_dir>/eval/<name>."""
    evaluations = {name: read_evaluation(folder) for name, folder in folders.items()}
    judges = [read.judge for read in evaluations.values()] or [NOBODY]
    judge = reduce(JudgeNote.or_worse, judges)
    console.print(comparison_table({name: read.summary for name, read in evaluations.items()}, judge))
    for name, read in evaluations.items():
        for line in invalid_lines(name, read.summary):
            console.print(line, style="bold red", soft_wrap=True)
        for line in note_lines(name, read.summary):
            console.print(line, style="yellow", soft_wrap=True)
    differences = compare_all({name: read.scores for name, read in evaluations.items()})
    if differences:
        console.print(difference_table(differences, judge))


_evaluate = Command(__doc__, MODELS, run_evaluate)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--compare"]:
        with exit_codes():
            run_compare(given[1:])
    else:
        _evaluate(given)


if __name__ == "__main__":
    main()
