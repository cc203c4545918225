"""Safety evaluation: Ray Data generates answers over a pool of models, then judges them.

    python -m pipelines.evaluate --config pipelines/configs/sandbox.yaml [section.key=value ...]
    python -m pipelines.evaluate --compare runs/a runs/b [runs/c ...]

Evaluates the base model, an adapter over it (evaluate.adapter) and, when the run folder has one, the
trained model. Writes <run_dir>/eval/<name>/scores.parquet (ids and numbers) and summary.json; the answers
lie under <run_dir>/private. The same command after a kill generates only what is missing.

--compare sets finished runs side by side: base, then each run's trained model (adapter, else its base),
with paired differences and p-values.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bdpo.config import Config
from bdpo.evaluation.answers import (
    EvaluatedModel,
    ShardAnswerer,
    ShardJudge,
    answer_store,
    answers_fingerprint,
    evaluated_model,
    evaluated_models,
    forget_failures,
    measure_capability,
    planned_items,
    score_store,
)
from bdpo.evaluation.capability import NOT_RUN, capability_fingerprint, harness_version
from bdpo.evaluation.compare import compare_all
from bdpo.evaluation.judges.registry import judge_kind
from bdpo.evaluation.measures import Summary, summarise
from bdpo.evaluation.results import chosen_models, read_evaluation
from bdpo.evaluation.tables import comparison_table, difference_table, invalid_lines
from bdpo.storage.cache import drop_local_copy
from bdpo.storage.manifests import Fingerprint, finished, write_manifest
from bdpo.storage.paths import StoragePath, write_parquet
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import ShardStore
from pipelines.runtime.cli import exit_codes, main
from pipelines.runtime.cluster import connect, require
from pipelines.runtime.pool import consume, in_hand, on_pool, run_here, shard_dataset
from pipelines.runtime.progress import console, progress_bar


def run_evaluate(config: Config, run: RunDir) -> None:
    """Evaluate what there is and print the comparison."""
    names = evaluated_models(config, run)
    for name in names:
        evaluate_model(config, run, name)
    print_comparison({name: run.eval(name) for name in names})


def evaluate_model(config: Config, run: RunDir, name: str, here: bool = False) -> Summary:
    """Evaluate the model called `name` unless that is done and valid; returns its summary.

    With `here` this process does it, with what it was given, instead of a pool.
    """
    if config.evaluate.capability:
        harness_version()  # before the hours of everything else
    model = evaluated_model(config, run, name)
    fingerprint = answers_fingerprint(config, model)
    scores = score_store(config, run, name, fingerprint)
    summary_file = run.eval(name) / "summary.json"
    manifest = finished(summary_file, scores.fingerprint)
    scores_file = run.eval(name) / "scores.parquet"
    if manifest is None or not manifest["valid"] or not scores_file.is_file():
        started = time.perf_counter()
        answers, total = answer_store(run, name, fingerprint), len(planned_items(config))
        _answer(config, name, model, answers, total, here)
        _judge(config, name, answers, scores, total, here)
        table = scores.read().sort_by("item_id")
        write_parquet(scores_file, table)
        seconds = time.perf_counter() - started
        summary = summarise(table)
        manifest = write_manifest(summary_file, scores.fingerprint, seconds=seconds, **summary.to_json())
    if here:
        drop_local_copy(run.model)  # the next rung has another
    capability = _capability(config, run, name, model, fingerprint)
    return replace(Summary.from_json(manifest), capability=capability)


def _answer(
    config: Config, name: str, model: EvaluatedModel, answers: ShardStore, total: int, here: bool
) -> None:
    arguments = {"config": config, "model": model, "store": answers}
    _work_off(config, f"answer {name}", ShardAnswerer, arguments, answers, total, here)


def _judge(
    config: Config, name: str, answers: ShardStore, scores: ShardStore, total: int, here: bool
) -> None:
    """Only a judge that is a model of its own gets the pool; the others are kept busy from here."""
    forget_failures(scores)
    arguments = {"config": config, "answers": answers, "scores": scores}
    here = here or not judge_kind(config).has_model
    _work_off(config, f"judge {name}", ShardJudge, arguments, scores, total, here)


def _work_off(
    config: Config,
    title: str,
    actor: type,
    arguments: dict[str, Any],
    store: ShardStore,
    total: int,
    here: bool,
) -> None:
    """Make the missing shards of `store`; what nodes that died had in hand comes again, twice at most."""
    evaluate = config.evaluate
    pool = evaluate.workers, evaluate.gpus_per_worker
    for may_fail in (in_hand(evaluate.workers), in_hand(evaluate.workers), 0):
        missing = store.missing(total, evaluate.batch_size)
        if not missing:
            break
        if here:
            run_here(actor, arguments, evaluate.gpus_per_worker, title, total, missing)
        else:
            dataset = on_pool(shard_dataset(missing, may_fail), "evaluate", actor, arguments, *pool)
            consume(dataset, title, total, missing)


def _capability(
    config: Config, run: RunDir, name: str, model: EvaluatedModel, answers: Fingerprint
) -> dict[str, Any]:
    """Each capability benchmark, run unless that is done; one that was not run is tried again."""
    evaluate = config.evaluate
    if not evaluate.capability:
        return {}
    fingerprint = capability_fingerprint(answers, evaluate.limit)
    folder = run.eval(name) / "capability"
    files: dict[str, StoragePath] = {
        benchmark: folder / f"{benchmark}.json" for benchmark in evaluate.capability
    }
    done = {benchmark: finished(file, fingerprint) for benchmark, file in files.items()}
    missing = [benchmark for benchmark, result in done.items() if result is None or NOT_RUN in result]
    if missing:
        connect()
        import ray

        require("evaluate", 1, evaluate.gpus_per_worker)
        device = "cuda" if evaluate.gpus_per_worker else "cpu"
        task = ray.remote(num_cpus=1, num_gpus=evaluate.gpus_per_worker)(measure_capability)
        pending = {benchmark: task.remote(config, model, benchmark, device) for benchmark in missing}
        with progress_bar(f"capability {name}", len(missing)) as advance:
            for benchmark, result in pending.items():
                done[benchmark] = write_manifest(files[benchmark], fingerprint, **ray.get(result))
                advance(1, benchmark)
    return done


def run_compare(roots: list[str]) -> None:
    """Print finished evaluations side by side.

    Raises:
        UserError: a run has no finished evaluation, or they answered other prompts or had other judges.
    """
    print_comparison(chosen_models(roots))


def print_comparison(folders: Mapping[str, StoragePath]) -> None:
    """The models' numbers, then their paired differences; `folders` are <run_dir>/eval/<name>."""
    evaluations = {name: read_evaluation(folder) for name, folder in folders.items()}
    console.print(comparison_table({name: read.summary for name, read in evaluations.items()}))
    for name, read in evaluations.items():
        for line in invalid_lines(name, read.summary):
            console.print(line, style="bold red", soft_wrap=True)
    differences = compare_all({name: read.scores for name, read in evaluations.items()})
    if differences:
        console.print(difference_table(differences))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        with exit_codes():
            run_compare(sys.argv[2:])
    else:
        main(run_evaluate, __doc__, lambda run: [run.root / "eval", run.private / "responses"])
