"""A run folder that is prepared and scored in this process, without Ray."""

from __future__ import annotations

from typing import Any

from bdpo.config import Config
from bdpo.data.pairs import pair_ids
from bdpo.scoring.scores import finish_scores, score_fingerprint, score_store
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import Prepare


def prepared_run(config: Config) -> RunDir:
    """The run folder of `config`, with prepared pairs and no lock."""
    run = RunDir(config.run_dir)
    run.open(config).release()
    Prepare(config, run).complete()
    return run


def score_here(config: Config, run: RunDir, scorer: type[ShardScorer] = ShardScorer) -> list[dict[str, Any]]:
    """Score every missing shard; returns what the scorer reports of each."""
    fingerprint = score_fingerprint(config, run)
    actor = scorer(config, run, fingerprint, "cpu")
    missing = score_store(run, fingerprint).missing(len(list(pair_ids(run.pairs))), config.score.shard_rows)
    return [actor({"first": first, "rows": count}) for first, count in missing]


def scored_run(config: Config) -> RunDir:
    """The run folder of `config`, with finished scores."""
    run = prepared_run(config)
    score_here(config, run)
    finish_scores(run, score_fingerprint(config, run), 1.0)
    return run
