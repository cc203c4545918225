"""Scoring pairs in memory: the numbers of the pipeline, and what is refused."""

from __future__ import annotations

from typing import get_type_hints

import pytest
import torch
from peft import LoraConfig, get_peft_model

import bdpo
from bdpo.config import DataConfig, ModelConfig, ScoreConfig
from bdpo.errors import UserError
from bdpo.scoring.in_memory import ScoringSettings
from bdpo.scoring.scores import SCORE_SCHEMA, read_scores
from tests.support.chats import CHATML, byte_tokenizer
from tests.support.helpers import (
    invented_pairs,
    naive_logps,
    save_model,
    tiny_config,
    tiny_gpt2,
    tiny_qwen2,
    write_jsonl,
)
from tests.support.scored_run import scored_run

LENGTHS = {"max_length": 128, "max_prompt_length": 96}


def score(model, tokenizer, rows, **settings):
    return bdpo.score_pairs(model, tokenizer, rows, **{**LENGTHS, **settings})


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_gpt2])
@pytest.mark.parametrize(
    ("mode", "empty"),
    [("empty_turn", "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"), ("bos", "<s>")],
)
def test_every_score_is_what_one_sequence_at_a_time_gives_in_float64(make, mode, empty, tiny_chat):
    rows, tokenizer, model = invented_pairs(7), tiny_chat.tokenizer, make()

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    scores = score(model, tokenizer, rows, unconditional=mode, tokens_per_batch=300)
    assert len(scores) == len(rows)
    for side in ("chosen", "rejected"):
        prompts = [
            ids(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n") for row in rows
        ]
        responses = [ids(row[side] + "<|im_end|>") for row in rows]
        tokens = torch.tensor([len(response) for response in responses])
        cond = naive_logps(make(), list(zip(prompts, responses, strict=True)))
        uncond = naive_logps(make(), [(ids(empty), response) for response in responses])
        assert scores.prompt_tokens.tolist() == list(map(len, prompts))
        assert getattr(scores, f"{side}_tokens").tolist() == tokens.tolist()
        for name, expected in {
            f"ref_{side}_logps": cond,
            f"uncond_{side}_logps": uncond,
            f"mi_{side}": (cond - uncond) / tokens,
        }.items():
            torch.testing.assert_close(getattr(scores, name).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_scores_are_those_that_the_pipeline_stores(tmp_path, tiny_chat):
    """Bit for bit, for the same rows in one shard: it is the same forward."""
    rows = invented_pairs(20)
    model = save_model(tmp_path / "model", tiny_chat)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = tiny_config(tmp_path / "run", model, data, score={"shard_rows": 64})
    stored = read_scores(config, scored_run(config))
    scores = score(tiny_qwen2(), tiny_chat.tokenizer, rows, tokens_per_batch=512)
    assert list(scores.pair_ids) == stored["pair_id"].to_pylist()
    for name in set(SCORE_SCHEMA.names) - {"pair_id", "group"}:
        assert getattr(scores, name).tolist() == stored[name].to_pylist(), name


def test_rows_of_any_format_have_the_scores_of_their_texts(tiny_chat):
    rows = invented_pairs(3)

    def turn(role, text):
        return [{"role": role, "content": text}]

    messages = [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in rows
    ]
    transcripts = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
        for row in rows
    ]
    plain = score(tiny_qwen2(), tiny_chat.tokenizer, rows)
    for others, settings in [(messages, {}), (transcripts, {}), (transcripts, {"format": "hh_rlhf"})]:
        found = score(tiny_qwen2(), tiny_chat.tokenizer, others, **settings)
        assert found.pair_ids == plain.pair_ids
        torch.testing.assert_close(found.mi_chosen, plain.mi_chosen)
    twice = score(tiny_qwen2(), tiny_chat.tokenizer, [rows[0], rows[0]])
    assert len(twice) == 2
    assert twice.pair_ids[0] == twice.pair_ids[1] == plain.pair_ids[0]


def test_unusable_rows_are_named_by_number_and_column_without_their_texts(tiny_chat):
    rows = invented_pairs(9)
    rows[2] |= {"rejected": rows[2]["chosen"]}
    del rows[4]["chosen"]
    tokenizer = tiny_chat.tokenizer
    with pytest.raises(UserError, match=r"^pairs\[2\]: chosen equals rejected; pairs\[4\]: chosen: missing$"):
        score(tiny_qwen2(), tokenizer, rows)
    long = [row | {"prompt": "fern " * 30} for row in invented_pairs(9)]
    with pytest.raises(UserError) as refused:
        score(tiny_qwen2(), tokenizer, long)
    message = str(refused.value)
    assert message.startswith("pairs[0]: prompt: longer than max_prompt_length; pairs[1]: ")
    assert message.endswith("; and 4 more")
    assert "fern" not in message
    for rows, reason in [([], "pairs: is empty"), (["text"], r"pairs\[0\]: expects a dict, not a str")]:
        with pytest.raises(UserError, match=reason):
            score(tiny_qwen2(), tokenizer, rows)
    with pytest.raises(UserError, match=r"^pairs: columns"):
        score(tiny_qwen2(), tokenizer, [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match=r"data.format=hh: unknown format"):
        score(tiny_qwen2(), tokenizer, invented_pairs(1), format="hh")


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_gpt2])
def test_the_model_is_afterwards_as_it_was(make, tiny_chat):
    """Its head, its mode and that of its parts, whether the scoring succeeds or not."""
    model = make().train()
    part = next(model.base_model.children()).eval()
    head, ids = model.get_output_embeddings(), torch.tensor([[5, 6, 7]])
    before = make()(ids).logits
    score(model, tiny_chat.tokenizer, invented_pairs(3))
    with torch.no_grad():
        broken = make()
        broken.get_input_embeddings().weight.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match=r"a log-prob is not finite with model.dtype=float32"):
            score(broken, tiny_chat.tokenizer, invented_pairs(3))
    for each in (model, broken):
        assert type(each.get_output_embeddings()) is torch.nn.Linear
    assert model.get_output_embeddings() is head
    assert model.training
    assert not part.training
    torch.testing.assert_close(model.eval()(ids).logits, before)


def test_dropout_of_a_model_in_training_is_off(tiny_chat):
    rows, tokenizer = invented_pairs(3), tiny_chat.tokenizer
    found, expected = (score(model, tokenizer, rows) for model in (tiny_gpt2().train(), tiny_gpt2()))
    torch.testing.assert_close(found.ref_chosen_logps, expected.ref_chosen_logps)


def test_the_loss_of_a_training_step_takes_the_scores(tiny_chat):
    scores = score(tiny_qwen2(), tiny_chat.tokenizer, invented_pairs(4))
    policy = [
        logps.clone().requires_grad_() for logps in (scores.ref_chosen_logps, scores.ref_rejected_logps)
    ]
    losses = bdpo.bdpo_loss(
        *policy, scores.ref_chosen_logps, scores.ref_rejected_logps, scores.mi_chosen, scores.mi_rejected
    )
    torch.testing.assert_close(losses, torch.full((4,), 2.0).log())
    losses.sum().backward()
    assert all(logps.grad.abs().min() > 0 for logps in policy)
    (policy[0] * scores.ref_chosen_logps).sum().backward()  # which no tensor of the inference mode allows


def test_the_base_of_a_model_with_an_adapter_is_scored_as_the_page_says(tiny_chat):
    rows, tokenizer = invented_pairs(4), tiny_chat.tokenizer
    tuned = get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(TypeError, match="expects a PreTrainedModel of transformers, not a PeftModel"):
        score(tuned, tokenizer, rows)
    plain = score(tiny_qwen2(), tokenizer, rows).ref_chosen_logps
    adapted = score(tuned.get_base_model(), tokenizer, rows).ref_chosen_logps
    with tuned.disable_adapter():
        base = score(tuned.get_base_model(), tokenizer, rows).ref_chosen_logps
    torch.testing.assert_close(base, plain)
    assert (adapted - plain).abs().min() > 1e-3


def test_a_model_or_tokenizer_that_cannot_score_is_refused(tiny_chat, make_chat):
    rows = invented_pairs(2)
    several = byte_tokenizer()
    several.chat_template = {"tool_use": CHATML}
    for tokenizer, message in (
        (byte_tokenizer(), "the tokenizer has no chat template"),
        (several, r"of the tokenizer's chat templates \(tool_use\) none is called default"),
    ):
        with pytest.raises(UserError, match=f"^tokenizer: {message}; set tokenizer.chat_template$"):
            score(tiny_qwen2(), tokenizer, rows)
    unfaithful = make_chat(CHATML.partition("{% if add_generation_prompt")[0]).tokenizer
    with pytest.raises(UserError, match=r"^tokenizer: chat template"):
        score(tiny_qwen2(), unfaithful, rows)
    with pytest.raises(UserError, match=r"data.max_length=2048: the model has no more than 512 positions"):
        bdpo.score_pairs(tiny_qwen2(), tiny_chat.tokenizer, rows)
    small = tiny_qwen2()
    small.resize_token_embeddings(100)
    with pytest.raises(UserError, match="tokenizer: the tokenizer has ids up to 261, the model has 100"):
        score(small, tiny_chat.tokenizer, rows)


@pytest.mark.parametrize("settings", [{"max_lenth": 9}, {"unconditional": "none"}, {"tokens_per_batch": 0}])
def test_a_setting_without_sense_is_named(settings, tiny_chat):
    with pytest.raises(ValueError, match=next(iter(settings))):
        score(tiny_qwen2(), tiny_chat.tokenizer, invented_pairs(1), **settings)


def test_the_settings_are_keys_of_the_config():
    sections = (DataConfig, ScoreConfig, ModelConfig)
    keys = {n: field.annotation for section in sections for n, field in section.model_fields.items()}
    assert get_type_hints(ScoringSettings).items() <= keys.items()
