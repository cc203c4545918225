"""Where a run stands, read from its folder alone: nothing is changed, loaded or asked of a cluster."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pyarrow.parquet as pq

from bdpo.config import Config
from bdpo.evaluation.results import MODEL_NAMES
from bdpo.scoring.selection import wants_scores
from bdpo.search.space import number_of_trials
from bdpo.search.sweep import Sweep
from bdpo.storage.manifests import read_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import StoragePath, open_parquet, sorted_glob
from bdpo.storage.run_dir import RunDir, run_config
from bdpo.training.batches import plan_without_lengths

State = Literal["done", "begun", "not begun"]

Stage = dict[str, Any]  # `stage` and `state` first, then what there is to know, numbers and names alone


def run_status(run: RunDir) -> list[Stage]:
    """The stages in their order: `stage`, `state`, and what each has done so far.

    Raises:
        UserError: there is no run in the folder.
    """
    config = run_config(run)
    account = read_manifest(run.data / "manifest.json")
    pairs = account["account"]["kept"] if account else None
    scored = [_score(run, pairs)] if wants_scores(config) else []
    if run.tune.is_dir():
        return [_prepare(account), *scored, _search(run, config)]
    stages = [_prepare(account), *scored, _train(run, config, pairs)]
    models = [name for name in MODEL_NAMES if name != "adapter" or config.evaluate.adapter]
    return [*stages, *(_evaluate(run, name) for name in models), *_experiments(run)]


def _stage(name: str, done: bool, begun: bool, **facts: Any) -> Stage:
    state: State = "done" if done else "begun" if begun else "not begun"
    return {
        "stage": name,
        "state": state,
        **{key: value for key, value in facts.items() if value is not None},
    }


def _prepare(manifest: dict[str, Any] | None) -> Stage:
    account = manifest["account"] if manifest else {}
    quarantined = sum(account["quarantined"].values()) if account else None
    return _stage(
        "prepare",
        manifest is not None,
        False,
        rows=account.get("rows"),
        pairs=account.get("kept"),
        quarantined=quarantined,
    )


def _score(run: RunDir, pairs: int | None) -> Stage:
    shards, rows = _shards(run.scores)
    manifest = read_manifest(run.scores / "manifest.json")
    return _stage(
        "score", manifest is not None and rows == pairs, shards > 0, rows=rows, of=pairs, shards=shards
    )


def _train(run: RunDir, config: Config, pairs: int | None) -> Stage:
    metrics = MetricsLog(run.metrics).read()
    last: dict[str, Any] = metrics[-1] if metrics else {}
    checkpoints = sorted_glob(run.train / "ray", "checkpoint_[0-9]*")  # Ray's own list is beside them
    manifest = read_manifest(run.train / "manifest.json")
    begun = read_manifest(run.train / "begun.json")
    pairs = begun.get("pairs", pairs) if begun else pairs  # a method or data.select may want a part of all
    return _stage(
        "train",
        manifest is not None and run.has_model(),
        bool(metrics),
        steps=int(last.get("step", 0)),
        of=plan_without_lengths(pairs, config.train, config.seed).total_steps if pairs else None,
        checkpoints=len(checkpoints),
        last_checkpoint=checkpoints[-1].name if checkpoints else None,
        recoveries=len(MetricsLog(run.recoveries).read()),
        loss=last.get("loss"),
        tokens_per_second=last.get("tokens_per_second"),
    )


def _search(run: RunDir, config: Config) -> Stage:
    """How many trials there are of each status, see `bdpo.search.trials.end_of`."""
    sweep = Sweep(config, run, {})
    trials = sweep.trials()
    done = read_manifest(run.tune / "summary.json") is not None
    counts = Counter(str(sweep.end_of(trial)) for trial in trials)
    return _stage(
        "search", done, bool(trials), trials=len(trials), of=number_of_trials(config.tune), **counts
    )


def _experiments(run: RunDir) -> list[Stage]:
    """How many trainings of all experiments are begun, trained and evaluated; nothing without any."""
    begun = sorted_glob(run.root / "experiments", "arms*/*/seed-*")
    parts = [RunDir(folder) for folder in begun]
    trained = sum(part.has_model() for part in parts)
    evaluated = sum((part.eval("trained") / "summary.json").is_file() for part in parts)
    counts = {"trainings": len(parts), "trained": trained, "evaluated": evaluated}
    return [_stage("experiments", evaluated == len(parts), True, **counts)] if parts else []


def _evaluate(run: RunDir, name: str) -> Stage:
    _, answers = _shards(run.responses(name))
    _, verdicts = _shards(run.eval(name) / "shards")
    summary = read_manifest(run.eval(name) / "summary.json")
    return _stage(
        f"evaluate {name}",
        summary is not None and bool(summary["valid"]),
        answers + verdicts > 0,
        answers=answers,
        verdicts=verdicts,
        valid=summary and summary["valid"],
    )


def expected_pairs(config: Config, run: RunDir) -> int | None:
    """How many pairs are prepared, or at most will be: drawn, or limited; None if only the data can tell."""
    manifest = read_manifest(run.data / "manifest.json")
    if manifest:
        return int(manifest["account"]["kept"])
    return sum(config.data.sample.values()) if config.data.sample else config.data.limit


def _shards(folder: StoragePath) -> tuple[int, int]:
    """Number of shards in a folder, and of rows in them; a bucket answers many requests at a time."""
    shards = sorted_glob(folder, "part-*.parquet")
    with ThreadPoolExecutor(8) as pool:
        return len(shards), sum(pool.map(_rows, shards))


def _rows(shard: StoragePath) -> int:
    try:
        return int(pq.read_metadata(open_parquet(shard)).num_rows)
    except FileNotFoundError:  # the run is at work: it was removed since it was listed
        return 0
