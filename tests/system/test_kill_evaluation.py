"""An evaluation that is killed on the way, on a Ray cluster of its own."""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.support.commands import kill_with_cluster, start_alone
from tests.support.evaluation import ITEMS, KEY, answers, canary_files, train_parrot, write_config
from tests.support.fake_endpoint import FINE, fake_endpoint, honest, take_apart


def start(file: Path) -> subprocess.Popen[str]:
    return start_alone("-m", "pipelines.evaluate", "--config", file, JUDGE_KEY=KEY)


def evaluate(file: Path) -> str:
    """Run the command to its end; what it printed."""
    process = start(file)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out + err


def wait_for(what: str, run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while len(list(run.glob(what))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_twice_no_item_is_generated_or_judged_twice(tmp_path: Path) -> None:
    """Killed while answering, then while judging, then left alone."""
    run = tmp_path / "run"
    responses, verdicts = "private/responses/base/part-*", "eval/base/shards/part-*"

    def slow(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(0.2)
        honest(**FINE)(handler, body)

    with fake_endpoint(slow) as endpoint:
        parrot, files = train_parrot(tmp_path / "parrot"), canary_files(tmp_path)
        config = write_config(run, parrot, endpoint.url, files, judge={"concurrency": 2}, batch_size=2)
        kept: dict[Path, int] = {}
        asked: Counter[str] = Counter()
        for what, count in ((responses, 3), (verdicts, 3)):
            process = start(config)
            wait_for(what, run, count, process)
            kill_with_cluster(process)
            kept |= {
                file: file.stat().st_mtime_ns
                for pattern in (responses, verdicts)
                for file in run.glob(pattern)
            }
            asked = Counter(take_apart(body).parts["request"] for body in endpoint.bodies)
        unfinished = len(list(run.glob(verdicts)))
        assert 3 <= unfinished < ITEMS / 2
        endpoint.script = honest(**FINE)
        evaluate(config)
        printed = evaluate(config)
    assert kept == {file: file.stat().st_mtime_ns for file in kept}  # nothing that was done was done again
    ids = [row["item_id"] for row in answers(run)]
    assert len(ids) == len(set(ids)) == ITEMS
    scores = pq.read_table(run / "eval" / "base" / "scores.parquet")["item_id"].to_pylist()
    assert sorted(scores) == sorted(ids)
    assert len(endpoint.bodies) - asked.total() == ITEMS - 1 - 2 * unfinished + _withstood_in(kept)
    assert re.search(r"answer base|judge base", printed) is None  # the last command found all done


def _withstood_in(kept: dict[Path, int]) -> int:
    """Behaviours without an attack among the verdicts that were kept: nobody was asked about those."""
    shards = [file for file in kept if "shards" in str(file)]
    rows = [row for shard in shards for row in pq.read_table(shard, partitioning=None).to_pylist()]
    return sum(row["new_tokens"] == 0 for row in rows)
