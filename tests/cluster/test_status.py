"""What `pipelines.status` says of a run, at every point of one: read back from what the stages write."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdpo.cluster import status
from bdpo.cluster.status import command_line
from bdpo.errors import UserError
from bdpo.evaluation.capability import NOT_RUN
from bdpo.evaluation.measures import VERDICT_SCHEMA
from bdpo.scoring.scores import SCORE_SCHEMA
from bdpo.storage import lease
from bdpo.storage.manifests import write_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir, run_config
from bdpo.storage.shards import ShardStore
from pipelines.runtime.registry import PIPELINE
from pipelines.status import run_status
from tests.support.commands import run_command
from tests.support.helpers import tiny_config

PAIRS = 20


@pytest.fixture
def run(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs.jsonl")
    run = RunDir(config.run_dir)
    run.record(config)
    return run


def stage(run, name):
    return next(found.as_json() for found in run_status(run) if found.stage == name)


def empty_rows(schema, count):
    nothing = {pa.string(): "", pa.bool_(): False}
    return pa.Table.from_pylist([{f.name: nothing.get(f.type, 0) for f in schema}] * count, schema=schema)


def prepare(run):
    run.pairs.mkdir(parents=True)
    pq.write_table(pa.table({"pair_id": [""] * PAIRS}), run.pairs / "part-00000.parquet")
    account = {"rows": 23, "kept": PAIRS, "quarantined": {"chosen: empty": 2, "duplicate": 1}}
    write_manifest(run.data / "manifest.json", {}, account=account, pairs_digest="x")


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        run_status(RunDir(tmp_path))


def test_a_command_is_at_work_stands_still_or_is_dead(run, monkeypatch):
    assert command_line(run) is None
    with run.open(run_config(run)):
        assert re.fullmatch(
            rf"command: pid {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-[\d: -]+: "
            r"at work \(last sign of life \d s ago\)",
            command_line(run),
        )
        holder = json.loads((run.root / ".holder").read_text())
        long_ago = time.time() - 600
        (run.root / ".holder").write_text(json.dumps(holder | {"alive": long_ago}))
        assert "stands still (last sign of life 60" in command_line(run)
        in_a_year = time.time() + 365 * 86400  # it was written before the clock was put right
        monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
        (run.root / ".holder").write_text(json.dumps(holder | {"alive": in_a_year}))
        assert "stands still (its last sign of life is in the future)" in command_line(run)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run.root / ".holder").write_text(json.dumps(holder | {"pid": ended.pid}))
    assert "dead (last sign of life" in command_line(run)
    with run.open(run_config(run)):  # the next command takes the place of the killed one
        assert "at work" in command_line(run)
    assert command_line(run) is None


def test_a_command_on_another_host_is_watched_for_a_sign_of_life(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    with run.open(run_config(run)):
        monkeypatch.setattr(status.socket, "gethostname", lambda: "another")
        assert command_line(run).endswith(": at work")
    monkeypatch.undo()
    (run.root / ".holder").write_text(json.dumps(vars(lease.Holder(host="another"))))
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    assert "no sign of life" in command_line(run)


def test_a_run_that_has_not_begun(run):
    stages = run_status(run)
    declared = [kind(run_config(run), run) for kind in PIPELINE]
    assert [stage.stage for stage in stages] == [stage.name for stage in declared if stage.applies]
    assert len(stages) >= 6
    assert {stage.state for stage in stages} == {"not begun"}


def test_scoring_half_way(run):
    prepare(run)
    store = ShardStore(run.scores, SCORE_SCHEMA, {"weights": "w"})
    for first in (0, 8):
        store.write(first, empty_rows(SCORE_SCHEMA, 8))
    assert stage(run, "prepare") == {
        "stage": "prepare", "state": "done", "rows": 23, "pairs": PAIRS, "quarantined": 3
    }  # fmt: skip
    assert stage(run, "score") == {"stage": "score", "state": "begun", "rows": 16, "of": PAIRS, "shards": 2}
    store.write(16, empty_rows(SCORE_SCHEMA, 4))
    assert stage(run, "score")["state"] == "begun"  # until the manifest says so
    write_manifest(run.scores / "manifest.json", {}, rows=PAIRS, seconds=1.0)
    assert stage(run, "score")["state"] == "done"
    next(run.scores.glob("part-*")).unlink()
    assert stage(run, "score")["state"] == "begun"


def test_pairs_that_are_gone_are_not_done(run):
    prepare(run)
    next(run.pairs.glob("part-*")).unlink()
    assert stage(run, "prepare") == {"stage": "prepare", "state": "begun"}


def test_a_capability_benchmark_that_was_not_run_is_open(tmp_path):
    evaluate = {"capability": ["hhh"]}
    run = RunDir(tmp_path)
    run.record(tiny_config(tmp_path, tmp_path / "model", tmp_path / "pairs", evaluate=evaluate))
    write_manifest(run.eval("base") / "summary.json", {}, valid=True)
    (run.eval("base") / "scores.parquet").touch()
    ShardStore(run.eval("base") / "shards", VERDICT_SCHEMA, {}).write(0, empty_rows(VERDICT_SCHEMA, 3))
    result = run.eval("base") / "capability" / "hhh.json"
    for facts, state in [({NOT_RUN: "no data"}, "begun"), ({"accuracy": {}}, "done")]:
        write_manifest(result, {}, **facts)
        assert stage(run, "evaluate base")["state"] == state


def test_training_half_way(run):
    prepare(run)
    for step in (1, 2):
        MetricsLog(run.metrics).append({"step": step, "loss": 0.5 / step, "tokens_per_second": 90.0})
    for name in ("checkpoint_2026-01-02", "checkpoint_2026-01-01"):
        (run.train / "ray" / name).mkdir(parents=True)
    (run.train / "ray" / "checkpoint_manager_snapshot.json").write_text("{}")  # Ray's
    train = stage(run, "train")
    assert (train["state"], train["steps"], train["of"]) == ("begun", 2, 3)  # 20 pairs, 8 a step
    assert (train["checkpoints"], train["last_checkpoint"]) == (2, "checkpoint_2026-01-02")
    assert train["loss"] == 0.25
    write_manifest(run.train / "manifest.json", {}, steps=3)
    assert stage(run, "train")["state"] == "begun"  # a model that is not there is not trained
    run.model.mkdir()
    assert stage(run, "train")["state"] == "begun"
    (run.model / "config.json").write_text("{}")  # written last: the model is whole
    assert stage(run, "train")["state"] == "done"


def test_evaluation_half_way(run):
    ShardStore(run.eval("base") / "shards", VERDICT_SCHEMA, {}).write(0, empty_rows(VERDICT_SCHEMA, 3))
    base = stage(run, "evaluate base")
    assert (base["state"], base["verdicts"]) == ("begun", 3)
    write_manifest(run.eval("base") / "summary.json", {}, valid=False)
    assert stage(run, "evaluate base")["state"] == "begun"
    write_manifest(run.eval("base") / "summary.json", {}, valid=True)
    assert stage(run, "evaluate base")["state"] == "begun"  # the same command collects the verdicts again
    (run.eval("base") / "scores.parquet").touch()
    assert stage(run, "evaluate base")["state"] == "done"
    assert stage(run, "evaluate trained")["state"] == "not begun"


def test_the_command(run, tmp_path):
    prepare(run)
    before = sorted(run.root.rglob("*"))
    shown = run_command("pipelines.status", run.root)
    assert shown.code == 0, shown.err
    assert "not begun" in shown.out
    assert json.loads(run_command("pipelines.status", run.root, "--json").out) == [
        s.as_json() for s in run_status(run)
    ]
    assert sorted(run.root.rglob("*")) == before
    missing = run_command("pipelines.status", tmp_path / "nothing")
    assert missing.code == 2
    assert missing.err.startswith("error: ")


def test_trainings_of_experiments_are_counted(tmp_path):
    run = RunDir(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "model", tmp_path / "pairs")
    run.record(config)
    assert all(stage.stage != "experiments" for stage in run_status(run))
    for seed, files in enumerate(
        [[], ["model/config.json"], ["model/config.json", "eval/trained/scores.parquet"]]
    ):
        folder = run.root / "experiments" / "arms" / "dpo" / f"seed-{seed}"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text("{}")
        if seed == 2:
            write_manifest(folder / "eval" / "trained" / "summary.json", {}, valid=True)
    counts = {"state": "begun", "trainings": 3, "trained": 2, "evaluated": 1}
    [found] = run_status(run)  # the stages of the pipeline are not begun
    assert found.as_json() == {"stage": "experiments"} | counts
