"""Evaluating a model in memory: the results of the pipeline's actors, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import bdpo
from bdpo.config import EvaluateConfig
from bdpo.errors import UserError
from bdpo.evaluation.answers import (
    EvaluatedModel,
    ShardAnswerer,
    ShardJudge,
    answer_store,
    answers_fingerprint,
    planned_items,
    reply_store,
    verdict_store,
)
from bdpo.evaluation.compare import compare_all
from bdpo.evaluation.in_memory import EvaluationSettings
from bdpo.evaluation.measures import summarise
from bdpo.evaluation.results import asked_and_judged
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.run_dir import RunDir
from tests.support.chats import byte_tokenizer
from tests.support.evaluation import CANARIES, canary_files
from tests.support.helpers import save_model, tiny_config, tiny_gpt2, tiny_qwen2

SETTINGS: Any = {"max_new_tokens": 6, "batch_size": 5, "temperature": 0.9, "seed": 3}


@pytest.fixture
def benchmarks(tmp_path: Path) -> dict[str, Any]:
    """A small file of each of three benchmarks."""
    files = canary_files(tmp_path)
    return {name: files[name] for name in ("strongreject", "xstest", "prefill")}


def evaluate(benchmarks: dict[str, Any], chat: ChatTokenizer, **settings: Any) -> bdpo.ModelEvaluation:
    return bdpo.evaluate_model(tiny_qwen2(), chat.tokenizer, benchmarks, **(SETTINGS | settings))


def test_rows_and_estimates_are_those_of_the_actors(
    tmp_path: Path, tiny_chat: ChatTokenizer, benchmarks: dict[str, Any]
) -> None:
    found = evaluate(benchmarks, tiny_chat)
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    config = tiny_config(
        tmp_path / "run",
        save_model(tmp_path / "model", tiny_chat),
        tmp_path / "pairs",
        evaluate={**settings, "benchmarks": list(benchmarks), **benchmarks},
    ).model_copy(update={"seed": SETTINGS["seed"]})
    run, model = RunDir(config.run_dir), EvaluatedModel(config.model)
    fingerprint = answers_fingerprint(config, model)
    answers = answer_store(run, "base", fingerprint)
    scores = verdict_store(config, run, "base", fingerprint)
    shards = answers.missing(len(planned_items(config)), config.evaluate.batch_size)
    answerer = ShardAnswerer(config, model, answers, "cpu")
    for first, rows in shards:
        answerer({"first": first, "rows": rows})
    judge = ShardJudge(config, answers, scores, reply_store(run, "base", scores.fingerprint), "cpu")
    for first, rows in shards:
        judge({"first": first, "rows": rows})
    stored = scores.read().sort_by("item_id")
    assert found.scores.to_pylist() == stored.to_pylist()
    assert found.summary == summarise(stored)
    assert found.fingerprint == asked_and_judged(scores.fingerprint)
    assert found.judge.name == "string_matching"
    texts = {row["item_id"]: row["response"] for row in answers.read().to_pylist()}
    assert {response.item_id: response.response for response in found.responses} == texts


def test_an_estimate_is_the_mean_of_its_rows(tiny_chat: ChatTokenizer, benchmarks: dict[str, Any]) -> None:
    """With a judge that calls answers safe and unsafe, here by a phrase that the random model writes."""
    found = evaluate(benchmarks, tiny_chat)
    rows = [row for row in found.scores.to_pylist() if row["benchmark"] == "strongreject"]
    estimate = found.summary.estimate("strongreject.safety")
    assert estimate.value == pytest.approx(sum(1 - row["harm"] for row in rows) / len(rows))
    assert estimate.n == len(rows) == 12
    assert estimate.known >= (estimate.low or 0)
    assert set(found.summary.benchmarks) == set(benchmarks)
    again = evaluate(benchmarks, tiny_chat)
    assert all(difference.difference == 0 for difference in differences(found, again))


def differences(one: bdpo.ModelEvaluation, other: bdpo.ModelEvaluation) -> list[Any]:
    """The paired differences of two evaluations, as the page shows."""
    found = compare_all({"one": one.scores, "other": other.scores})
    assert found
    return [comparison.difference for comparison in found]


def test_neither_texts_nor_output_leave_the_result(
    tiny_chat: ChatTokenizer, benchmarks: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(benchmarks, tiny_chat)
    assert "".join(capfd.readouterr()) == ""
    assert not any(canary in repr(found) for canary in CANARIES)
    assert all(isinstance(response.response, str) for response in found.responses)


def test_a_model_in_training_is_evaluated_without_dropout_and_trains_on(
    tiny_chat: ChatTokenizer, benchmarks: dict[str, Any]
) -> None:
    model, short = tiny_gpt2().train(), {"strongreject": benchmarks["strongreject"]}
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.9
    found, expected = (
        bdpo.evaluate_model(each, tiny_chat.tokenizer, short, max_new_tokens=4)
        for each in (model, tiny_gpt2())
    )
    assert [r.response for r in found.responses] == [r.response for r in expected.responses]
    assert model.training
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("benchmarks", "judge", "settings", "message"),
    [
        ({"strongrejct": {}}, None, {}, "strongrejct"),
        ({"strongreject": {"pth": "x"}}, None, {}, r"evaluate\.strongreject\.pth"),
        ({"strongreject": {}}, None, {}, "evaluate.strongreject.path"),
        ({"xstest": {"path": "x.csv"}}, {"name": "harmbench"}, {}, "cannot judge benchmark xstest"),
        ({"xstest": {"path": "x.csv"}}, {"name": "nobody"}, {}, "nobody"),
        ({}, None, {"max_new_token": 4}, "max_new_token: not one of"),
        ({}, None, {}, "evaluate.benchmarks"),
        ({"xstest": {"path": "x.csv"}}, None, {"limit": 0}, "evaluate.limit"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    benchmarks: Any, judge: Any, settings: Any, message: str, tiny_chat: ChatTokenizer
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        bdpo.evaluate_model(tiny_qwen2(), tiny_chat.tokenizer, benchmarks, judge, **settings)
    assert "\n" not in str(refused.value)


def test_a_judge_that_cannot_be_asked_stops_it_before_the_model_is(
    tiny_chat: ChatTokenizer, benchmarks: dict[str, Any]
) -> None:
    model, nobody = tiny_qwen2(), {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model is asked"))
    with pytest.raises(UserError, match=r"evaluate\.judge"):
        bdpo.evaluate_model(model, tiny_chat.tokenizer, benchmarks, {"name": "rubric", **nobody})


def test_a_tokenizer_without_template_is_refused(benchmarks: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="tokenizer: the tokenizer has no chat template; set"):
        bdpo.evaluate_model(tiny_qwen2(), byte_tokenizer(), benchmarks)


def test_the_settings_are_keys_of_the_config() -> None:
    keys = {name: field.annotation for name, field in EvaluateConfig.model_fields.items()}
    hints = get_type_hints(EvaluationSettings)
    assert {name: hints[name] for name in hints.keys() & keys.keys()}.keys() == hints.keys() - {
        "seed",
        "template_kwargs",
    }
    assert hints["part"] == keys["part"]
