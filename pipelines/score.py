"""Mutual-information scoring: Ray Data shards the pairs over a pool of reference-model actors.

    python -m pipelines.score --config pipelines/configs/sandbox.yaml [section.key=value ...]

Reads `data.path`, writes <run_dir>/data/pairs and <run_dir>/scores. An actor commits each shard itself,
so the same command after a kill scores only what is missing.
"""

from __future__ import annotations

import time
from typing import Any

from bdpo.config import Config
from bdpo.data import count_pairs
from bdpo.runs import Fingerprint, RunDir, finished
from bdpo.scoring import ShardScorer, finish_scores, score_fingerprint, score_store
from pipelines.cli import console, main
from pipelines.pool import consume, on_pool, shard_dataset
from pipelines.prepare import run_prepare


def run_score(config: Config, run: RunDir) -> dict[str, Any]:
    """Prepare and score all pairs unless that is done; returns the manifest of the scores."""
    run_prepare(config, run)
    return score_prepared(config, run)


def score_prepared(config: Config, run: RunDir) -> dict[str, Any]:
    """Score the prepared pairs unless that is done; returns the manifest of the scores."""
    fingerprint = score_fingerprint(config, run)
    manifest = finished(run.scores / "manifest.json", fingerprint)
    total = count_pairs(run.pairs)
    missing = score_store(run, fingerprint).missing(total, config.score.shard_rows)
    if manifest is None or missing:  # a finished run may have lost or damaged shards since
        started = time.perf_counter()
        _score(config, run, fingerprint, total, missing)
        manifest = finish_scores(run, fingerprint, time.perf_counter() - started)
    console.print(f"[bold]scores[/]    {manifest['rows']} pairs")
    return manifest


def _score(
    config: Config, run: RunDir, fingerprint: Fingerprint, total: int, missing: list[tuple[int, int]]
) -> None:
    if missing:
        arguments = {"config": config, "run_dir": run.root, "fingerprint": fingerprint}
        pool = config.score.workers, config.score.gpus_per_worker
        dataset = on_pool(shard_dataset(missing), "score", ShardScorer, arguments, *pool)
        consume(dataset, "score", total, missing)


if __name__ == "__main__":
    main(run_score, __doc__, lambda run: [run.data, run.scores])
