"""The evaluation as its users run it, on the Ray cluster of the session, judged over HTTP."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bdpo.evaluation.measures import VERDICT_SCHEMA, summarise
from bdpo.storage.manifests import write_manifest
from bdpo.storage.paths import write_parquet
from bdpo.storage.run_dir import RunDir
from tests.support.commands import Ended, run_command
from tests.support.evaluation import (
    ANSWER,
    CANARIES,
    ITEMS,
    JUDGED,
    KEY,
    PROMPT,
    SECRETS,
    answers,
    canary_files,
    leaks,
    train_parrot,
    write_config,
)
from tests.support.fake_endpoint import FINE, fake_endpoint, honest, reply
from tests.support.score_rows import row

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_parrot(tmp_path_factory.mktemp("parrot"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    return canary_files(tmp_path)


def evaluate(file: Path) -> str:
    """Run the command to its end; what it printed."""
    done = run_command("pipelines.evaluate", "--config", file)
    assert done.code == 0, done.err
    return done.out + done.err


@pytest.mark.ray
def test_no_text_and_no_key_leaves_the_private_folder(
    parrot: Path, files: dict[str, Any], tmp_path: Path, ray_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that quotes what it was sent, in errors and in replies; then one that works."""

    def quoting(handler: Any, body: dict[str, Any]) -> None:
        status = (401, 500, 200)[len(endpoint.bodies) % 3]
        reply(handler, json.dumps([JUDGED, body, handler.headers["Authorization"]]).encode(), status)

    run = tmp_path / "run"
    for name, value in SECRETS.items():  # as in the environment of the cluster's node
        monkeypatch.setenv(name, value)
    with fake_endpoint(quoting) as endpoint:
        config = write_config(run, parrot, endpoint.url, files)
        printed = evaluate(config)
        assert "strongreject is invalid, 12 of 12 unjudged" in printed
        before = {file: file.stat().st_mtime_ns for file in (run / "private/responses").rglob("*.parquet")}
        asked = len(endpoint.bodies)
        endpoint.script = honest(**FINE)
        printed += evaluate(config)
    sent = json.dumps(endpoint.bodies)
    assert PROMPT in sent  # the canaries were there to leak
    assert ANSWER in sent
    assert f"Bearer {KEY}" in endpoint.authorizations
    assert ANSWER in str(answers(run))
    assert before == {
        file: file.stat().st_mtime_ns for file in (run / "private/responses").rglob("*.parquet")
    }
    assert len(endpoint.bodies) - asked == ITEMS - 1  # all but the behaviour without an attack, judged again

    logs = [file for file in ray_session.rglob("*") if file.is_file()]
    assert leaks([run, ray_session], run / "private") == []
    assert [canary for canary in CANARIES if canary in printed] == []
    assert (run / "private").stat().st_mode & 0o777 == 0o700
    for file in (run / "private").rglob("*"):
        assert file.is_dir() or file.stat().st_mode & 0o077 == 0
    assert any("worker" in file.name and file.stat().st_size for file in logs)

    summary = json.loads((run / "eval" / "base" / "summary.json").read_text())
    assert summary["valid"]
    counted = {name: part["n"] for name, part in summary["benchmarks"].items()}
    assert counted == {
        "strongreject": 12, "xstest": 6, "jailbreak": 3, "prefill": 2, "wrapped": 24, "simpleqa": 1
    }  # fmt: skip
    assert summary["benchmarks"]["strongreject"]["safety"]["value"] == pytest.approx(1 - 5 / 8)
    assert summary["benchmarks"]["jailbreak"]["safety"]["value"] == pytest.approx(1 - 5 / 8)


def test_two_runs_are_compared_on_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: finished evaluations are read back."""

    def finish(name: str, model: str, harms: list[float | None], prompts: str = "same", **more: str) -> None:
        run = RunDir(tmp_path / name)
        rows = [{**row(n, harm), **more} for n, harm in enumerate(harms)]
        table = pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)
        run.eval(model).mkdir(parents=True)
        write_parquet(run.eval(model) / "scores.parquet", table)
        write_manifest(run.eval(model) / "summary.json", {"prompts": prompts}, **summarise(table).to_json())

    def compare(*names: str) -> Ended:
        return run_command("pipelines.evaluate", "--compare", *(tmp_path / name for name in names))

    monkeypatch.setenv("COLUMNS", "160")
    finish("a", "base", [1.0] * 10)
    finish("a", "trained", [1.0] * 9 + [0.0])
    finish("b", "trained", [0.0] * 10)
    finish("c", "trained", [None] * 10)
    finish("d", "base", [0.0] * 10, prompts="other")
    shown = compare("a", "b")
    assert shown.code == 0, shown.err
    assert re.search(r"┃ +n ┃ +a/base ┃ +a/trained ┃ +b/trained ┃", shown.out)
    assert re.search(r"a/trained →.*\+90\.0.*0\.0039", shown.out)  # McNemar: 9 of 9 the same way, 2/2^9
    assert "not the same kind" not in shown.out
    finish("e", "base", [0.0] * 10)
    assert "not the same kind of model of each run: trained of a, base of e" in compare("a", "e").out
    invalid = compare("a", "c")
    assert "c/trained: strongreject is invalid, 10 of 10 unjudged (10 undecided)" in invalid.out
    assert "→ c/trained" not in invalid.out
    finish("f", "trained", [None] * 10, unanswered="not_asked")
    assert (
        "f/trained: strongreject is invalid, none of its 10 requests has an attack" in compare("a", "f").out
    )
    for names, message in (
        (("a", "d"), "prompts"),
        (("a",), "two run folders"),
        (("a", "none"), "no finished"),
    ):
        refused = compare(*names)
        assert refused.code == 2
        assert message in refused.err
        assert refused.err.count("\n") == 1


@pytest.mark.ray
def test_what_an_actor_finds_wrong_is_one_line_and_exit_code_2(
    parrot: Path, files: dict[str, Any], tmp_path: Path
) -> None:
    lacking = {"benchmarks": ["jailbreak"]}
    config = write_config(tmp_path / "run", parrot, "http://127.0.0.1:9/v1", files, **lacking)
    without = "evaluate.judge.api_key_env=NO_SUCH_KEY"
    done = run_command("pipelines.evaluate", "--config", config, without)
    assert done.code == 2
    assert re.fullmatch(r"error: .*NO_SUCH_KEY is not set here.*", done.err.strip().split("\n")[-1])
    assert PROMPT not in done.err
