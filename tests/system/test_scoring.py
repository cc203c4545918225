"""Scoring by actors of a Ray cluster that can never succeed: the command ends, and says why."""

from __future__ import annotations

import os
import resource

import pytest
from ray.exceptions import RayError

from bdpo.errors import UserError
from bdpo.scoring import shard_scorer
from bdpo.scoring.scores import finish_scores, score_fingerprint
from bdpo.scoring.shard_scorer import ShardScorer
from pipelines import score
from pipelines.prepare import Prepare
from pipelines.runtime import pool
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.scored_run import prepared_run, score_here


class FullDiskScorer(ShardScorer):
    """Its files may have no more bytes than a shard needs at least: the system refuses the write."""

    def __call__(self, shard):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return super().__call__(shard)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class StillbornScorer(ShardScorer):
    """Its process ends before it is made."""

    def __init__(self, *_, run, **__):
        with (run.root / "births").open("a") as births:
            births.write("x")
        os._exit(9)


@pytest.fixture
def prepared(tmp_path, tiny_chat):
    """Config and run folder with 20 prepared pairs."""
    data = write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(20))
    config = tiny_config(tmp_path / "run", save_model(tmp_path / "model", tiny_chat), data)
    return config, prepared_run(config)


def run_score(config, run):
    """What the command does in a run folder."""
    Prepare(config, run).complete()
    return score.Score(config, run).complete()


@pytest.mark.ray
def test_a_full_disk_is_said_and_the_rerun_completes(sent_by_value, prepared, monkeypatch):
    config, run = prepared
    monkeypatch.setattr(shard_scorer, "ShardScorer", FullDiskScorer)
    with pytest.raises(UserError, match=rf"run_dir={run.root}: cannot be .* written \(File too large\)"):
        run_score(config, run)
    assert not list(run.scores.iterdir())  # what was half written gives its space back
    monkeypatch.setattr(shard_scorer, "ShardScorer", ShardScorer)
    score_here(config, run)
    assert finish_scores(run, score_fingerprint(config, run), 1.0)["rows"] == 20


@pytest.mark.ray
def test_actors_that_die_at_birth_end_the_run(sent_by_value, prepared, monkeypatch):
    """Ray alone would make new ones for ever."""
    config, run = prepared
    monkeypatch.setattr(shard_scorer, "ShardScorer", StillbornScorer)
    monkeypatch.setattr(pool, "RESTARTS", 1)
    monkeypatch.setattr(pool, "MAX_INIT_DEATHS", 1)
    with pytest.raises(RayError):
        run_score(config, run)
    assert (run.root / "births").read_text() == "xx" * 2
