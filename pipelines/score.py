"""Mutual-information scoring: Ray Data shards the pairs over a pool of reference-model actors.

    python -m pipelines.score --config pipelines/configs/sandbox.yaml [section.key=value ...]
    python -m pipelines.score --config pipelines/configs/sandbox.yaml --inspect

Reads `data.path`, writes <run_dir>/data/pairs and <run_dir>/scores. An actor commits each shard itself,
so the same command after a kill scores only what is missing. A pair that cannot be scored is named when
all others are. --inspect shows the distribution of the mutual information in a finished run folder, and
what every actor did.
"""

from __future__ import annotations

import json
import time
from typing import Any

from bdpo.config import Config
from bdpo.data import count_pairs
from bdpo.errors import UserError
from bdpo.report import mi_tables, work_table
from bdpo.runs import Fingerprint, RunDir, finished
from bdpo.scoring import (
    MOST_UNSCORABLE,
    ShardScorer,
    finish_scores,
    finished_scores,
    score_fingerprint,
    score_store,
    unscorable,
)
from pipelines.cli import console, main
from pipelines.pool import ATTEMPTS, consume, on_pool, shard_dataset
from pipelines.prepare import run_prepare

# A shard that kills its actors comes again in so many: a row is found in two or three rounds.
FINER = 32


def run_score(config: Config, run: RunDir) -> dict[str, Any]:
    """Prepare and score all pairs unless that is done; returns the manifest of the scores."""
    run_prepare(config, run)
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
    """Score what is missing. Shards under which their actors died come again in smaller ones, down to a row.

    Raises:
        UserError: pairs cannot be scored, and all others are; or the run folder cannot be written.
    """
    reasons: dict[int, str] = {}  # of rows that cannot be scored

    def note(shard: dict[str, Any]) -> None:
        if shard["stop"]:
            raise UserError(shard["stop"])
        reasons.update({int(row): reason for row, reason in json.loads(shard["unscorable"]).items()})
        if len(reasons) > MOST_UNSCORABLE:
            raise unscorable(run, reasons)

    store, size = score_store(run, fingerprint), config.score.shard_rows
    arguments = {"config": config, "run_dir": run.root, "fingerprint": fingerprint}
    pool = config.score.workers, config.score.gpus_per_worker
    while missing:
        queue = 2 if size == config.score.shard_rows else 1
        shards = shard_dataset(missing, may_fail=MOST_UNSCORABLE)
        dataset = on_pool(shards, "score", ShardScorer, arguments, *pool, queue=queue)
        consume(dataset, "score", total, missing, note)
        missing = store.missing(total, max(1, size // FINER), reasons)
        if size == 1:
            reasons |= {row: f"its worker died of it {ATTEMPTS} times" for row, _ in missing}
            break
        size = max(1, size // FINER)
    if reasons:
        raise unscorable(run, reasons)


def show_scores(config: Config, run: RunDir) -> None:
    """Print the finished scores of a run folder as tables.

    Raises:
        UserError: there are none.
    """
    manifest, scores = finished_scores(run)
    made_with = manifest["fingerprint"]
    for table in (*mi_tables(scores, config.method), work_table(manifest["workers"])):
        console.print(table, "")
    console.print(
        f"{manifest['rows']:,} pairs, {made_with['dtype']}, unconditional={made_with['unconditional']}, "
        f"at most {made_with['max_length']} tokens, weights {made_with['weights'][:12]}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main(run_score, __doc__, lambda run: [run.data, run.scores], inspect=show_scores)
