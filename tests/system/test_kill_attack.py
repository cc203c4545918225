"""An attack that is killed on the way, on a Ray cluster of its own."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bdpo.config import load_config, parse_config
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.sandbox import with_sandbox_files
from bdpo.storage.run_dir import RunDir
from pipelines.attack import AttackBase
from pipelines.status import run_status
from tests.support import ROOT
from tests.support.attacks import IN_PROCESS, REQUESTS, attack_config
from tests.support.commands import kill_with_cluster, start_alone
from tests.support.fake_endpoint import FINE, fake_endpoint, honest


def test_a_killed_attack_makes_what_is_missing_and_nothing_again(
    tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    """Eight draws a request, none of which the judge calls harmful; killed once a request is recorded.

    The endpoint sees by the key which of the two commands asks.
    """

    def slow(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        time.sleep(0.1)
        honest(**{**FINE, "refusal": 1})(handler, body)

    with fake_endpoint(slow) as endpoint:
        judge = {
            "name": "rubric",
            "base_url": endpoint.url,
            "model": "m",
            "concurrency": 1,
            "api_key_env": "JUDGE_KEY",
        }
        values = attack_config(tmp_path, tiny_chat, n=8, batch_size=4).model_dump()
        values["evaluate"]["judge"] = judge
        config = parse_config(values, "test")
        file = tmp_path / "config.yaml"
        file.write_text(config.to_yaml())
        run = RunDir(config.run_dir)
        records = Path(str(run.attack_texts("best_of_n", "base"))) / "records"
        command = "-m", "pipelines.attack", "--config", file
        process = start_alone(*command, JUDGE_KEY="first")
        deadline = time.monotonic() + 300
        while not list(records.glob("part-*")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kill_with_cluster(process)
        kept = {part: part.stat().st_mtime_ns for part in records.glob("part-*")}
        assert 0 < len(kept) < REQUESTS
        process = start_alone(*command, JUDGE_KEY="second")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert endpoint.authorizations.count("Bearer second") == 8 * (REQUESTS - len(kept))
    assert kept.items() <= {part: part.stat().st_mtime_ns for part in records.glob("part-*")}.items()
    scores = pq.read_table(str(run.attack("best_of_n", "base") / "scores.parquet"))
    assert len(set(scores["item_id"].to_pylist())) == scores.num_rows == REQUESTS
    assert scores["queries"].to_pylist() == [8] * REQUESTS
    [status] = [found for found in run_status(run) if found.stage == "attack best_of_n base"]
    assert status.state == "done"


def test_attacks_succeed_against_the_base_of_the_sandbox(tmp_path: Path) -> None:
    """By its own exact judge; the base model complies, so an attack that fails there is broken."""
    changes = ["attack.limit=6", "attack.gpus_per_worker=0", f"run_dir={tmp_path / 'run'}"]
    for attack in (["attack.name=best_of_n", "attack.n=4"], ["attack.name=gcg", "attack.candidates=8"]):
        config = load_config(ROOT / "pipelines" / "configs" / "sandbox.yaml", [*changes, *attack])
        config = with_sandbox_files(config)
        stage = AttackBase(config, RunDir(config.run_dir), executor=IN_PROCESS)
        stage.complete()
        assert stage.summary().success.value == 1.0
