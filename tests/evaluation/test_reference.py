"""Log-probs of answers under the base model: what no rule on a text finds is broken by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from bdpo.config.model import ModelConfig
from bdpo.evaluation.measures import VERDICT_SCHEMA, summarise
from bdpo.evaluation.reference import FEWEST_TOKENS, LOGP_SCHEMA, UNLIKELY, mean_logps, with_logps
from bdpo.models.logps import LogpsModel
from bdpo.models.tokenizer import ChatTokenizer, load_tokenizer
from bdpo.storage.manifests import read_manifest
from bdpo.storage.paths import read_parquet
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import Evaluate, EvaluateBase
from pipelines.runtime.pool import InProcess
from tests.support.benchmark_files import write_csv
from tests.support.evaluation import ANSWER, train_parrot
from tests.support.helpers import tiny_config, tiny_qwen2
from tests.support.score_rows import row


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_parrot(tmp_path_factory.mktemp("parrot") / "model")


def test_the_mean_is_over_the_tokens_of_the_answer(tiny_chat: ChatTokenizer) -> None:
    prompts = ["Why?", "What is the longest word?", "Who?", "Who?"]
    answers = ["Because of the rain.", "It has many letters, and nobody knows.", "Me", "long " * 200]
    groups = [
        (tiny_chat.prompt_ids([{"role": "user", "content": p}]), tiny_chat.text_ids(a, continues=True))
        for p, a in zip(prompts, answers, strict=True)
    ]
    model = tiny_qwen2()
    expected = []
    for prompt, answer in groups[:2]:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected.append(logits.log_softmax(-1)[range(len(answer)), answer].mean().item())
    assert len(groups[2][1]) < FEWEST_TOKENS
    model.config.max_position_embeddings = 512  # the last answer is longer
    found = mean_logps(LogpsModel(model, 512), groups)
    assert found == [pytest.approx(expected[0], abs=1e-4), pytest.approx(expected[1], abs=1e-4), None, None]


def test_an_answer_that_the_base_model_finds_unlikely_is_broken() -> None:
    """One that is broken by its text stays so, and one without a number is not."""
    rows = [row(n, 0.0, cut=False, broken="empty" if n == 3 else None) for n in range(5)]
    values = [UNLIKELY + 0.01, UNLIKELY - 0.01, None, UNLIKELY - 1, 0.0]
    logps = [{"item_id": r["item_id"], "reference_logp": v} for r, v in zip(rows, values, strict=True)]
    table = pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA)
    found = with_logps(table, pa.Table.from_pylist(logps[::-1], schema=LOGP_SCHEMA))
    assert found["broken"].to_pylist() == [None, "unlikely", None, "empty", None]
    assert found["reference_logp"].to_pylist() == values
    total = summarise(found).benchmarks["strongreject"].total
    assert total.broken == {"empty": 1, "unlikely": 1}
    assert total.estimates["unbroken"].value == pytest.approx(3 / 5)


def test_letters_in_another_order_are_unlikely(parrot: Path) -> None:
    """The base model knows one sentence; the rules on the text find nothing in either answer."""
    chat = load_tokenizer(ModelConfig(name_or_path=str(parrot), dtype="float32"))
    model = LogpsModel(AutoModelForCausalLM.from_pretrained(parrot), 512)
    prompt = chat.prompt_ids([{"role": "user", "content": "please do it now"}])
    words = ANSWER[::-1]
    found = mean_logps(model, [(prompt, chat.text_ids(text, continues=True)) for text in (ANSWER, words)])
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] > UNLIKELY > found[1]


def evaluated(tmp_path: Path, parrot: Path, **evaluate: Any) -> tuple[Any, RunDir]:
    rows = [["id", "prompt", "type", "label", "focus", "note"]]
    rows += [[str(n), f"Sing song {n}", "ducks", "safe", "", ""] for n in range(10)]
    values = {"benchmarks": ["xstest"], "xstest": {"path": str(write_csv(tmp_path / "x.csv", rows))}}
    values |= {"max_new_tokens": 24, "gpus_per_worker": 0, "batch_size": 4}
    config = tiny_config(tmp_path / "run", parrot, tmp_path / "pairs", evaluate=values | evaluate)
    run = RunDir(config.run_dir)
    return config, run


def test_an_evaluation_has_them_where_the_config_says_so(tmp_path: Path, parrot: Path) -> None:
    """The base model finds its own answers likely, and those of a model with other weights not."""
    config, run = evaluated(tmp_path, parrot, reference_logps=True)
    EvaluateBase(config, run, executor=InProcess(0)).complete()
    model = AutoModelForCausalLM.from_pretrained(parrot)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * weights.std())
    model.save_pretrained(run.model)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run.model / file).write_bytes((parrot / file).read_bytes())
    Evaluate(config, run, "trained", InProcess(0)).complete()
    base, trained = (
        read_parquet(run.eval(name) / "scores.parquet")["reference_logp"].to_pylist()
        for name in ("base", "trained")
    )
    assert min(base) > -1
    measured = [logp for logp in trained if logp is not None]
    assert measured
    assert max(measured) < UNLIKELY
    manifest = read_manifest(run.eval("trained") / "summary.json")
    assert manifest is not None
    assert manifest["benchmarks"]["xstest"]["unbroken"]["value"] <= 1 - len(measured) / 10
    assert manifest.fingerprint["reference"] != manifest.fingerprint["weights"]


def test_without_it_nothing_is_forwarded(tmp_path: Path, parrot: Path) -> None:
    config, run = evaluated(tmp_path, parrot)
    EvaluateBase(config, run, executor=InProcess(0)).complete()
    assert "reference_logp" not in read_parquet(run.eval("base") / "scores.parquet").column_names
    assert not (run.eval("base") / "reference").exists()
