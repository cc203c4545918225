"""The evaluation as its users run it: a command of its own, on a Ray cluster of its own, judged over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from bdpo.evaluation.benchmarks import prefill, simpleqa, strongreject, xstest
from bdpo.evaluation.measures import SCORE_SCHEMA, summarise
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from tests.support import ROOT
from tests.support.benchmark_files import artifact, write_csv, write_json
from tests.support.chats import CHATML, byte_tokenizer
from tests.support.fake_endpoint import FINE, fake_endpoint, honest, reply, take_apart
from tests.support.helpers import tiny_qwen2
from tests.support.score_rows import row

pytestmark = pytest.mark.ray

PROMPT, ANSWER, JUDGED, KEY = (
    "canary-prompt-7c1e",
    "canary-answer-90b2",
    "canary-judge-44aa",
    "sk-canary-51d0",
)

CANARIES = (PROMPT, ANSWER, JUDGED, KEY)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained to answer everything with the answer canary."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    chat = ChatTokenizer(tokenizer)
    model = tiny_qwen2().train()
    prompts = [f"{word} {PROMPT}" for word in ("a", "be", "cat", "door", "eight", "please do it now")]
    answer = chat.response_ids(ANSWER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        prompt = chat.prompt_ids([{"role": "user", "content": prompts[step % len(prompts)]}])
        ids = torch.tensor([prompt + answer])
        loss = model(
            input_ids=ids, labels=torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("parrot")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A small file of every benchmark, the canary in each text."""
    harmful = [[f"c{n % 3}", "x", f"{PROMPT} number {n} " + "pad " * (n % 5)] for n in range(12)]
    types = [("ducks", "safe"), ("contrast_ducks", "unsafe")]
    mixed = [[str(n), f"{PROMPT} {n}", *types[n % 2], "", ""] for n in range(6)]
    return {
        "strongreject_path": str(write_csv(tmp_path / "s.csv", [list(strongreject.COLUMNS), *harmful])),
        "xstest_path": str(write_csv(tmp_path / "x.csv", [list(xstest.COLUMNS), *mixed])),
        "jailbreak_paths": [
            str(write_json(tmp_path / "jbb.json", artifact(prompts=(f"Sing {PROMPT}", None, PROMPT))))
        ],
        "prefill_path": str(
            write_csv(
                tmp_path / "p.csv", [list(prefill.COLUMNS), ["knots", f"Tie {PROMPT}", f"Sure {PROMPT}"]]
            )
        ),
        "prefill_tokens": [2, 8],
        "simpleqa_path": str(write_csv(tmp_path / "q.csv", [list(simpleqa.COLUMNS), ["{}", PROMPT, PROMPT]])),
    }


@pytest.fixture
def ray_dir() -> Iterator[Path]:
    """Where Ray keeps sockets and logs; short, because the path of a socket may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="bdpo", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(config: dict[str, Any], run: Path, ray_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"run_dir": str(run), **config}), encoding="utf-8")
    environment = {
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(ray_dir),
        "JUDGE_KEY": KEY,
        "RAY_worker_niceness": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.evaluate", "--config", str(file), *overrides],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def evaluate(config: dict[str, Any], run: Path, ray_dir: Path, *overrides: str) -> str:
    """Run the command to its end; what it printed."""
    process = start(config, run, ray_dir, *overrides)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out + err


def config_of(parrot: Path, url: str, files: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(parrot), "dtype": "float32"},
        "data": {"path": "unused"},
        "evaluate": {
            "benchmarks": ["strongreject", "xstest", "jailbreak", "prefill", "wrapped", "simpleqa"],
            "judge": "rubric",
            "judge_base_url": url,
            "judge_model": "fake",
            "judge_api_key_env": "JUDGE_KEY",
            "judge_retries": 0,
            "max_new_tokens": 24,
            "batch_size": 8,
            "gpus_per_worker": 0,
            **files,
            **changes,
        },
    }


ITEMS = 12 + 6 + 3 + 2 + 24 + 1


def answers(run: Path) -> list[dict[str, Any]]:
    shards = sorted((run / "private" / "responses" / "base").glob("part-*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard, partitioning=None).to_pylist()]


def leaks(roots: Sequence[Path], private: Path) -> list[str]:
    """Files outside of the private folder that hold a canary; Parquet is read, because it is compressed."""
    found = []
    for file in (file for root in roots for file in root.rglob("*") if file.is_file()):
        if private in file.parents:
            continue
        content = file.read_bytes()
        if file.suffix == ".parquet":
            content += str(pq.read_table(file, partitioning=None).to_pydict()).encode()
        found += [f"{canary} in {file}" for canary in CANARIES if canary.encode() in content]
    return found


def test_no_text_and_no_key_leaves_the_private_folder(
    parrot: Path, files: dict[str, Any], tmp_path: Path, ray_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge that quotes what it was sent, in errors and in replies; then one that works."""

    def quoting(handler: Any, body: dict[str, Any]) -> None:
        status = (401, 500, 200)[len(endpoint.bodies) % 3]
        reply(handler, json.dumps([JUDGED, body, handler.headers["Authorization"]]).encode(), status)

    run = tmp_path / "run"
    with fake_endpoint(quoting) as endpoint:
        config = config_of(parrot, endpoint.url, files)
        printed = evaluate(config, run, ray_dir)
        assert "strongreject is invalid, 12 of 12 unjudged" in printed
        before = {file: file.stat().st_mtime_ns for file in (run / "private").rglob("*.parquet")}
        asked = len(endpoint.bodies)
        endpoint.script = honest(**FINE)
        printed += evaluate(config, run, ray_dir)
    sent = json.dumps(endpoint.bodies)
    assert PROMPT in sent  # the canaries were there to leak
    assert ANSWER in sent
    assert f"Bearer {KEY}" in endpoint.authorizations
    assert ANSWER in str(answers(run))
    assert before == {file: file.stat().st_mtime_ns for file in (run / "private").rglob("*.parquet")}
    assert len(endpoint.bodies) - asked == ITEMS - 1  # all but the behaviour without an attack, judged again

    found = leaks([run, ray_dir], run / "private")
    with capsys.disabled():
        logs = [file for file in ray_dir.rglob("*") if file.is_file()]
        print(f"\n{len(found)} leaks in {len(logs)} files of Ray and the run folder")
    assert found == []
    assert [canary for canary in CANARIES if canary in printed] == []
    assert (run / "private").stat().st_mode & 0o777 == 0o700
    for file in (run / "private").rglob("*"):
        assert file.is_dir() or file.stat().st_mode & 0o077 == 0
    assert any("ray" in str(file) and file.stat().st_size for file in logs)

    summary = json.loads((run / "eval" / "base" / "summary.json").read_text())
    assert summary["valid"]
    counted = {name: part["n"] for name, part in summary["benchmarks"].items()}
    assert counted == {
        "strongreject": 12, "xstest": 6, "jailbreak": 3, "prefill": 2, "wrapped": 24, "simpleqa": 1
    }  # fmt: skip
    assert summary["benchmarks"]["strongreject"]["safety"]["value"] == pytest.approx(1 - 5 / 8)
    assert summary["benchmarks"]["jailbreak"]["safety"]["value"] == pytest.approx(1 - 5 / 8 * 2 / 3)


def wait_for(what: str, run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list(run.glob(what))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_twice_no_item_is_generated_or_judged_twice(
    parrot: Path, files: dict[str, Any], tmp_path: Path, ray_dir: Path
) -> None:
    """Killed while answering, then while judging, then left alone."""
    run = tmp_path / "run"
    responses, verdicts = "private/responses/base/part-*", "eval/base/shards/part-*"

    def slow(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(0.2)
        honest(**FINE)(handler, body)

    with fake_endpoint(slow) as endpoint:
        config = config_of(parrot, endpoint.url, files, batch_size=2, judge_concurrency=2)
        kept: dict[Path, int] = {}
        asked: Counter[str] = Counter()
        for what, count in ((responses, 3), (verdicts, 3)):
            process = start(config, run, ray_dir)
            wait_for(what, run, count, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(3)  # the cluster dies with its driver
            kept |= {
                file: file.stat().st_mtime_ns
                for pattern in (responses, verdicts)
                for file in run.glob(pattern)
            }
            asked = Counter(take_apart(body).parts["request"] for body in endpoint.bodies)
        unfinished = len(list(run.glob(verdicts)))
        assert 3 <= unfinished < ITEMS / 2
        endpoint.script = honest(**FINE)
        evaluate(config, run, ray_dir)
        printed = evaluate(config, run, ray_dir)
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


def test_two_runs_are_compared_on_the_terminal(tmp_path: Path) -> None:
    """Without Ray: finished evaluations are read back."""

    def finish(name: str, model: str, harms: list[float | None], prompts: str = "same") -> None:
        run = RunDir(tmp_path / name)
        table = pa.Table.from_pylist([row(n, harm) for n, harm in enumerate(harms)], schema=SCORE_SCHEMA)
        run.eval(model).mkdir(parents=True)
        pq.write_table(table, run.eval(model) / "scores.parquet")
        write_manifest(run.eval(model) / "summary.json", {"prompts": prompts}, **summarise(table).to_json())

    def compare(*names: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "pipelines.evaluate",
            "--compare",
            *(str(tmp_path / name) for name in names),
        ]
        environment = {**os.environ, "COLUMNS": "160"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    finish("a", "base", [1.0] * 10)
    finish("a", "trained", [1.0] * 9 + [0.0])
    finish("b", "trained", [0.0] * 10)
    finish("c", "trained", [None] * 10)
    finish("d", "base", [0.0] * 10, prompts="other")
    shown = compare("a", "b")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"┃ +n ┃ +base ┃ +a ┃ +b ┃", shown.stdout)
    assert re.search(r"a → b.*\+90\.0.*0\.0039", shown.stdout)  # McNemar: 9 of 9 the same way, 2/2^9
    invalid = compare("a", "c")
    assert "c: strongreject is invalid, 10 of 10 unjudged (10 undecided)" in invalid.stdout
    assert "→ c" not in invalid.stdout
    for names, message in (
        (("a", "d"), "prompts"),
        (("a",), "two run folders"),
        (("a", "none"), "no finished"),
    ):
        refused = compare(*names)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_what_an_actor_finds_wrong_is_one_line_and_exit_code_2(
    parrot: Path, files: dict[str, Any], tmp_path: Path, ray_dir: Path
) -> None:
    config = config_of(parrot, "http://127.0.0.1:9/v1", files, judge_api_key_env="NO_SUCH_KEY")
    config["evaluate"]["benchmarks"] = ["jailbreak"]
    process = start(config, tmp_path / "run", ray_dir)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 2
    assert re.fullmatch(r"error: .*NO_SUCH_KEY is not set here.*", err.strip().split("\n")[-1])
    assert PROMPT not in err
