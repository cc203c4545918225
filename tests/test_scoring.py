"""Scoring a run folder: pairs that cannot be scored, memory that runs out, stale or foreign results."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from helpers import encoded_pairs, invented_pairs, save_model, tiny_config, tiny_qwen2, write_jsonl

from bdpo.data import PAIR_SCHEMA, pair_ids, read_pairs
from bdpo.errors import UserError
from bdpo.logps import LogpsModel
from bdpo.runs import RunDir, read_manifest, write_manifest
from bdpo.scoring import (
    MOST_UNSCORABLE,
    ReferenceScorer,
    ShardScorer,
    finish_scores,
    reference_logps,
    score_apart,
    score_fingerprint,
    score_store,
)
from pipelines import cli, pool, score
from pipelines.prepare import run_prepare

ROOT = Path(__file__).parents[1]
RAISES, KILLS, NOT_A_NUMBER = "~", "@", "^"


class UnluckyScorer(ShardScorer):
    """Cannot score three kinds of pairs: a token raises, a token is not a number, a text kills the process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        tokens = self.scorer.chat.tokenizer.convert_tokens_to_ids
        with torch.no_grad():
            self.scorer.model.model.get_input_embeddings().weight[tokens(NOT_A_NUMBER)] = torch.nan
        self.scorer.model.register_forward_pre_hook(self.look)
        self.raising, self.killing = tokens(RAISES), tokens(KILLS)

    def look(self, _, args):
        seen = {token for tree in args[0] for token in tree.context}
        if self.killing in seen:
            os._exit(9)
        if self.raising in seen:
            raise IndexError("the text of a prompt")


@pytest.fixture(scope="module")
def ray_cluster():
    """A local cluster whose workers are sent the classes of this module."""
    cli.connect()
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_chat):
    return save_model(tmp_path_factory.mktemp("model"), tiny_chat)


@pytest.fixture
def make_run(tmp_path, model, capsys):
    """make_run(rows, **config): config and run folder with prepared pairs."""

    def make(rows, **changes):
        data = write_jsonl(tmp_path / "pairs.jsonl", rows)
        config = tiny_config(tmp_path / "run", model, data, **changes)
        run = RunDir(config.run_dir)
        run.open(config).release()
        run_prepare(config, run)
        return config, run

    return make


def score_all(config, run, scorer=ShardScorer):
    """Every missing shard in this process; what the scorer said of each."""
    fingerprint = score_fingerprint(config, run)
    total, rows = len(list(pair_ids(run.pairs))), config.score.shard_rows
    actor = scorer(config, run.root, fingerprint, "cpu")
    missing = score_store(run, fingerprint).missing(total, rows)
    return [actor({"first": first, "rows": count}) for first, count in missing]


def with_mark(row, mark):
    return row | {"prompt": f"{mark} {row['prompt']}"}


@pytest.mark.ray
def test_pairs_that_cannot_be_scored_are_named_when_all_others_are_scored(
    ray_cluster, make_run, tmp_path, monkeypatch
):
    """One raises, one is not finite, one kills its process every time; the next run needs only these."""
    rows, bad = invented_pairs(26), {3: RAISES, 12: NOT_A_NUMBER, 21: KILLS}
    rows = [with_mark(row, bad[i]) if i in bad else row for i, row in enumerate(rows)]
    config, run = make_run(rows, score={"workers": 2})
    ids = list(pair_ids(run.pairs))
    monkeypatch.setattr(score, "ShardScorer", UnluckyScorer)
    monkeypatch.setattr(pool, "ATTEMPTS", 1)
    with pytest.raises(UserError) as refused:
        score.run_score(config, run)
    message = str(refused.value)
    assert "\n" not in message
    assert f"pair_id {ids[3]} (row 3 of data/pairs): IndexError at test_scoring.py:" in message
    assert f"pair_id {ids[12]} (row 12 of data/pairs): a log-prob is not finite" in message
    assert f"pair_id {ids[21]} (row 21 of data/pairs): its worker died of it" in message
    assert message.count("pair_id") == 3
    assert "text of a prompt" not in message
    store = score_store(run, score_fingerprint(config, run))
    assert store.missing(26, 8) == [(3, 1), (12, 1), (21, 1)]
    assert not (run.scores / "manifest.json").exists()

    monkeypatch.setattr(score, "ShardScorer", ShardScorer)
    before = {shard.name for shard in run.scores.glob("part-*")}
    score.run_score(config, run)
    assert len({shard.name for shard in run.scores.glob("part-*")} - before) == 3
    whole = RunDir(tmp_path / "whole")
    whole.root.mkdir()
    whole.data.symlink_to(run.data)
    score_all(config, whole)
    uninterrupted, recovered = score_store(whole, store.fingerprint).read(), store.read()
    assert recovered["pair_id"].to_pylist() == uninterrupted["pair_id"].to_pylist() == ids
    for column in ("ref_chosen_logps", "uncond_rejected_logps", "mi_chosen"):
        ours, theirs = (torch.tensor(t[column].to_pylist()) for t in (recovered, uninterrupted))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
