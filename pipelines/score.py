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
from collections.abc import Iterator
from typing import Any

from bdpo.config import Config
from bdpo.data.pairs import count_pairs
from bdpo.errors import UserError
from bdpo.models.loading import model_config
from bdpo.models.logps import prefix_sharing_obstacle
from bdpo.reports.scores import mi_tables, work_table
from bdpo.scoring.scores import (
    MAX_UNSCORABLE,
    finish_scores,
    finished_scores,
    score_fingerprint,
    score_store,
    unscorable_error,
)
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.storage.manifests import Fingerprint, finished
from bdpo.storage.paths import discard
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import run_prepare
from pipelines.runtime.cli import main
from pipelines.runtime.pool import ATTEMPTS, consume, in_hand, on_pool, shard_dataset
from pipelines.runtime.progress import console

# A shard that kills its actors comes again in so many pieces, and they in so many.
FINER = 32


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
        discard(run.scores / "manifest.json")  # it says that all is there
        started = time.perf_counter()
        _score(config, run, fingerprint, total, missing)
        manifest = finish_scores(run, fingerprint, time.perf_counter() - started)
    console.print(f"[bold]scores[/]    {manifest['rows']} pairs")
    return manifest


def _score(
    config: Config, run: RunDir, fingerprint: Fingerprint, total: int, missing: list[tuple[int, int]]
) -> None:
    """Score what is missing, in rounds: what failed with its actors comes again, at last row by row.

    Raises:
        UserError: pairs cannot be scored, and all others are; or the run folder cannot be written.
    """
    reasons: dict[int, str] = {}  # of rows that cannot be scored

    def note(shard: dict[str, Any]) -> None:
        if shard["stop"]:
            raise UserError(shard["stop"])
        reasons.update({int(row): reason for row, reason in json.loads(shard["unscorable"]).items()})
        if len(reasons) > MAX_UNSCORABLE:
            raise unscorable_error(run, reasons)

    store = score_store(run, fingerprint)
    before = sum(rows for _, rows in missing)
    why_plain = prefix_sharing_obstacle(model_config(config.model), config.data.max_length)
    if why_plain:
        console.print(f"every response has a row of its own: {why_plain}", soft_wrap=True)
    arguments = {"config": config, "run": run, "fingerprint": fingerprint}
    pool = config.score.workers, config.score.gpus_per_worker
    may_fail = MAX_UNSCORABLE + in_hand(config.score.workers)
    for number, size in enumerate(_rounds(config.score.shard_rows)):
        if number:
            missing = store.missing(total, size, reasons)
        if not missing:
            break
        if number:
            rows = sum(rows for _, rows in missing)
            console.print(f"{rows} pairs were lost with their actors; again, {size} in a shard")
        dataset = shard_dataset(missing, may_fail)
        dataset = on_pool(dataset, "score", ShardScorer, arguments, *pool, queue=1 if number else 2)
        consume(dataset, "score", total, missing, note)
    else:
        alone = store.missing(total, 1, reasons)
        if len(alone) == before > 1:
            raise RuntimeError(
                "every actor died, whatever it was given to score: it is not the pairs; Ray's log files of "
                "the workers say why (session_latest/logs/worker-*.err)"
            )
        reasons |= {row: f"its actor died of it, {ATTEMPTS} times alone" for row, _ in alone}
    if reasons:
        raise unscorable_error(run, reasons)


def _rounds(shard_rows: int) -> Iterator[int]:
    """Rows in a shard, round by round: once more the same, as it may have been the machine; then finer."""
    yield shard_rows
    while shard_rows > 1:
        yield shard_rows
        shard_rows = max(1, shard_rows // FINER)
    yield 1


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
