"""Answers become verdicts, shard by shard; what a judge wrote is kept in private."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from bdpo.config.judges import StringMatchingConfig
from bdpo.evaluation.answers import (
    RESPONSE_SCHEMA,
    EvaluatedModel,
    ShardAnswerer,
    ShardJudge,
    answer_store,
    measure_capability,
    planned_items,
    prompts_fingerprint,
    reply_store,
    verdict_store,
)
from bdpo.evaluation.benchmarks.strongreject import COLUMNS
from bdpo.evaluation.judges.base import Harm, Question, Verdict
from bdpo.evaluation.judges.registry import JUDGES, judge_fingerprint
from bdpo.evaluation.measures import summarise
from bdpo.evaluation.responses import Response
from bdpo.evaluation.results import MODEL_FIELDS
from bdpo.models.loading import model_config
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.run_dir import RunDir
from tests.support.benchmark_files import write_csv
from tests.support.chats import CHATML, byte_tokenizer
from tests.support.fake_endpoint import FINE, completion, fake_endpoint, graded, reply, take_apart
from tests.support.helpers import save_model, tiny_config


def configured(tmp_path: Path, url: str) -> Any:
    rows = [["a", "x", f"Tie {n}"] for n in range(3)]
    file = write_csv(tmp_path / "prompts.csv", [list(COLUMNS), *rows])
    judge = {"name": "rubric", "base_url": url, "model": "m", "retries": 0}
    benchmarks = {"benchmarks": ["strongreject"], "strongreject": {"path": str(file)}}
    return tiny_config(
        tmp_path, tmp_path / "model", tmp_path / "pairs", evaluate={"judge": judge, **benchmarks}
    )


def test_replies_and_sub_scores_are_kept_in_private(tmp_path: Path) -> None:
    """One bad reply fails one item; the replies of all are there, the bad ones too."""

    def script(handler: Any, body: dict[str, Any]) -> None:
        asked = take_apart(body)
        bad = asked.parts["request"] == "Tie 1"
        reply(handler, completion("canary" if bad else graded(asked, **FINE)))

    with fake_endpoint(script) as endpoint:
        config, run = configured(tmp_path, endpoint.url), RunDir(tmp_path / "run")
        items, fingerprint = planned_items(config), {"prompts": "p"}
        answers, scores = (
            answer_store(run, "base", fingerprint),
            verdict_store(config, run, "base", fingerprint),
        )
        replies = reply_store(run, "base", scores.fingerprint)
        rows = [asdict(Response(item.item_id, "Cross.", 1)) for item in items]
        answers.write(0, pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA))
        judge = ShardJudge(config, answers, scores, replies, "cpu")
        for _ in range(2):  # judged again, the replies are those of the last time
            scores.remove(0)
            judge({"first": 0, "rows": len(items)})
    verdicts = {row["item_id"]: row for row in scores.read().to_pylist()}
    assert [row["failure"] for row in verdicts.values()] == [None, "unparsable", None]
    assert [row["harm"] for row in verdicts.values()] == [5 / 8, None, 5 / 8]
    kept = {row["item_id"]: row for row in replies.read().to_pylist()}
    assert kept.keys() == verdicts.keys()
    good, bad = kept["strongreject-0001"], kept["strongreject-0002"]
    assert dict(good["scores"]) == {"refusal": "0", "convincingness": "4", "specificity": "3"}
    assert (len(good["replies"]), bad["replies"]) == (1, ["canary", "canary"])
    [file] = (run.private / "replies" / "base").glob("part-*")  # type: ignore[union-attr]
    assert file.stat().st_mode & 0o777 == 0o600
    assert "canary" not in str(scores.read().to_pylist())


def test_a_reply_that_no_column_can_hold_ends_nothing(tmp_path: Path) -> None:
    """Whatever a judge writes, its verdicts stay and its replies can be read."""

    class Odd:
        concurrency = 1

        def __call__(self, question: Question, response: str) -> Verdict:
            return Harm(1.0, replies=("so \ud800 be it", "\0"), scores=(("why \udfff", "1"),))

    config, run = configured(tmp_path, "http://127.0.0.1:9/v1"), RunDir(tmp_path / "run")
    items = planned_items(config)
    answers, scores = answer_store(run, "base", {}), verdict_store(config, run, "base", {})
    replies = reply_store(run, "base", {})
    rows = [asdict(Response(item.item_id, "Cross.", 1)) for item in items]
    answers.write(0, pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA))
    judge = ShardJudge(config, answers, scores, replies, "cpu")
    judge.judge = Odd()
    judge({"first": 0, "rows": len(items)})
    assert [row["harm"] for row in scores.read().to_pylist()] == [1.0] * 3
    kept = replies.read().to_pylist()[0]
    assert (kept["replies"], dict(kept["scores"])) == (["so ? be it", "\0"], {"why ?": "1"})


def test_a_prompt_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    rows = [["a", "x", "Tie 1"], ["a", "x", "Tie " * 5000]]
    file = write_csv(tmp_path / "prompts.csv", [list(COLUMNS), *rows])
    chat = byte_tokenizer()
    chat.chat_template = CHATML
    model = save_model(tmp_path / "model", ChatTokenizer(chat))
    benchmarks = {"benchmarks": ["strongreject"], "strongreject": {"path": str(file)}}
    config, run = (
        tiny_config(tmp_path, model, tmp_path / "pairs", evaluate=benchmarks),
        RunDir(tmp_path / "run"),
    )
    answers = answer_store(run, "base", {})
    ShardAnswerer(config, EvaluatedModel(config.model), answers, "cpu")({"first": 0, "rows": 2})
    scores = verdict_store(config, run, "base", {})
    ShardJudge(config, answers, scores, reply_store(run, "base", {}), "cpu")({"first": 0, "rows": 2})
    found = {row["item_id"]: row for row in scores.read().to_pylist()}
    assert found["strongreject-0002"]["unanswered"] == "prompt_too_long"
    assert (found["strongreject-0002"]["harm"], found["strongreject-0002"]["cut"]) == (None, False)
    assert found["strongreject-0001"]["harm"] is not None
    summary = summarise(list(found.values())).benchmarks["strongreject"]
    assert (summary.total.failures, summary.valid) == ({"prompt_too_long": 1}, False)


def test_an_actor_that_generates_gives_signs_of_life_within_each_token(
    tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    config, run = configured(tmp_path, "http://127.0.0.1:9/v1"), RunDir(tmp_path / "run")
    save_model(Path(config.model.name_or_path), tiny_chat)
    actor = ShardAnswerer(config, EvaluatedModel(config.model), answer_store(run, "base", {}), "cpu")
    layers = model_config(config.model).num_hidden_layers
    for first, rows in ((0, 2), (2, 1)):
        signs: list[float] = []
        actor.progress = signs.append  # type: ignore[method-assign]
        actor({"first": first, "rows": rows})
        tokens = max(actor.store.read_shard(first)["new_tokens"].to_pylist())
        assert tokens > 1
        shares = [rows * token / config.evaluate.max_new_tokens for token in range(1, tokens + 1)]
        assert signs == [share for share in shares for _ in range(layers)]


def test_an_actor_that_judges_reports_each_verdict(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    config, run = configured(tmp_path, "http://127.0.0.1:9/v1"), RunDir(tmp_path / "run")
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"judge": StringMatchingConfig()})}
    )
    answers, scores = answer_store(run, "base", {}), verdict_store(config, run, "base", {})
    rows = [asdict(Response(item.item_id, "Cross.", 1)) for item in planned_items(config)]
    answers.write(0, pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA))
    judge, signs = ShardJudge(config, answers, scores, reply_store(run, "base", {}), "cpu"), []
    judge.progress = signs.append  # type: ignore[method-assign]
    judge({"first": 0, "rows": 3})
    assert signs == [1, 2, 3]


def test_the_fields_of_a_model_are_no_others(tmp_path: Path) -> None:
    """What decides whether two evaluations can be compared is all that is not the model's own."""
    config = configured(tmp_path, "http://127.0.0.1:9/v1")
    chat = byte_tokenizer()
    chat.chat_template = CHATML
    save_model(Path(config.model.name_or_path), ChatTokenizer(chat))
    own = EvaluatedModel(config.model).fingerprint().keys()
    assert own <= MODEL_FIELDS
    assert not MODEL_FIELDS & {**prompts_fingerprint(config), **judge_fingerprint(config)}.keys()
    assert {"rubric", "fitted", "string_matching"} <= JUDGES.keys()


def test_a_capability_task_reports_its_start_and_every_forward(
    tmp_path: Path, tiny_chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one that stands still is noticed long before a benchmark would have ended."""

    def two_forwards(benchmark: str, model: Any, *arguments: Any) -> str:
        begun.append(("run", benchmark))
        for _ in range(2):
            model(torch.tensor([[1, 2]]))
        return "result"

    begun: list[tuple[str, str]] = []
    monkeypatch.setattr("bdpo.evaluation.capability.run_capability", two_forwards)
    config = tiny_config(tmp_path, save_model(tmp_path / "model", tiny_chat), tmp_path / "pairs")
    model = EvaluatedModel(config.model)
    found: Any = measure_capability(config, model, "gsm8k", "cpu", lambda *what: begun.append(what))
    assert found == "result"
    forward = ("forward", "a forward of gsm8k")
    assert begun == [("start", "the start of gsm8k"), ("run", "gsm8k"), forward, forward]
