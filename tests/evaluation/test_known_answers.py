"""Answers that a judge has to tell apart: who passes, who does not, and that the results say it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bdpo.errors import UserError
from bdpo.evaluation.judges.base import Failed, Harm, Refusal
from bdpo.evaluation.judges.known_answers import KNOWN_REQUESTS, known_texts, require_discernment
from bdpo.evaluation.judges.registry import (
    CHECKED,
    JudgeNote,
    judge_fingerprint,
    judge_label,
    judge_note,
    make_judge,
)
from bdpo.evaluation.judges.string_matching import StringMatching
from tests.support.helpers import tiny_config
from tests.support.tokenizers import byte_level

BOTH = frozenset({"harm", "refusal"})

KIND_OF = {
    getattr(known, kind): kind for known in KNOWN_REQUESTS for kind in ("refusal", "harmless", "harmful")
}


@dataclass
class Oracle:
    """Knows every answer, and is wrong about some of them."""

    wrong_about: tuple[str, ...] = ()
    concurrency: int = 1

    def __call__(self, question, response):
        kind, wrong = KIND_OF[response], response in self.wrong_about
        if question.rubric == "refusal":
            return Refusal((kind == "refusal") != wrong)
        return Harm(float((kind == "harmful") != wrong))


def answers(kind, count):
    return tuple(getattr(known, kind) for known in KNOWN_REQUESTS[:count])


def test_every_answer_is_another_text():
    assert len(KIND_OF) == 3 * len(KNOWN_REQUESTS)
    assert len(set(known_texts())) == 4 * len(KNOWN_REQUESTS)


@pytest.mark.parametrize("wrong_about", [(), answers("harmful", 1) + answers("refusal", 1)])
def test_a_mistake_in_each_class_is_allowed(wrong_about):
    require_discernment(Oracle(wrong_about), BOTH, "x")


@pytest.mark.parametrize(
    ("wrong_about", "found"),
    [
        (answers("harmful", 2), "12 of 12 harmless and 4 of 6 harmful"),
        (answers("harmless", 2), "10 of 12 harmless and 6 of 6 harmful"),
        (answers("refusal", 1) + answers("harmless", 1), "10 of 12 harmless and 6 of 6 harmful"),
    ],
)
def test_two_are_not(wrong_about, found):
    with pytest.raises(UserError, match=f"^x: judges {found} known answers right") as caught:
        require_discernment(Oracle(wrong_about), BOTH, "x")
    assert "\n" not in str(caught.value)


def test_two_mistakes_about_refusals_are_not():
    def judge(question, response):
        return Oracle(answers("refusal", 2) if question.rubric == "refusal" else ())(question, response)

    require_discernment(judge, frozenset({"harm"}), "x")
    with pytest.raises(UserError, match="4 of 6 refusing and 6 of 6 complying"):
        require_discernment(judge, BOTH, "x")


@pytest.mark.parametrize(
    "judge",
    [
        lambda question, response: Harm(0.0),
        lambda question, response: Harm(1.0),
        lambda question, response: Failed("unparsable"),
        lambda question, response: 1 / 0,
        lambda question, response: Harm(float(len(question.request) % 2)),
        lambda question, response: Harm(float(len(response) % 2)),
        lambda question, response: Harm(1.0 - Oracle()(question, response).harm),
        StringMatching(),  # which takes every answer that does not refuse for harmful
    ],
)
def test_a_judge_without_discernment_is_refused(judge):
    with pytest.raises(UserError, match="verdicts mean nothing"):
        require_discernment(judge, frozenset({"harm"}), "x")


def test_phrases_tell_the_refusals():
    require_discernment(StringMatching(), frozenset({"refusal"}), "x")


def guard(folder, fitted, **keys):
    """A tiny random Llama Guard and its config; `fitted`: its head, by least squares on the known answers."""
    tokenizer = byte_level(["<s>", "</s>", "<|end|>"], ["unsafe", "safe"], bos="<s>", eos="</s>")
    tokenizer.chat_template = "{{ messages[1].content }}<|end|>"
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape, **ends))
    if fitted:
        states, replies = [], []
        for text, kind in KIND_OF.items():
            reply = "unsafe" if kind == "harmful" else "safe"
            ids = torch.tensor([tokenizer.encode(f"{text}<|end|>{reply}")])
            with torch.no_grad():
                states.append(model.model(input_ids=ids).last_hidden_state[0, -2:])
            replies += tokenizer.convert_tokens_to_ids([reply, "</s>"])
        expected = torch.nn.functional.one_hot(torch.tensor(replies), len(tokenizer)).double()
        head = torch.linalg.lstsq(torch.cat(states).double(), expected).solution
        model.lm_head.weight.data = head.T.float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    judge = {"name": "llama_guard", "model": str(folder), **keys}
    return tiny_config(folder, folder, folder, evaluate={"judge": judge, "benchmarks": ["strongreject"]})


def test_a_trained_classifier_is_used(tmp_path):
    config = guard(tmp_path, fitted=True)
    make_judge(config)
    note = JudgeNote.of(judge_fingerprint(config), {})
    assert note.label == judge_label(config) == judge_note(config).label == "llama_guard"


def test_an_untrained_one_is_refused_or_called_unchecked(tmp_path):
    config = guard(tmp_path, fitted=False)
    with pytest.raises(
        UserError, match=rf"^evaluate\.judge\.model={tmp_path}, as llama_guard: judges 0 of 12 "
    ):
        make_judge(config)
    unchecked = guard(tmp_path, fitted=False, check=False)
    make_judge(unchecked)
    fingerprint = judge_fingerprint(unchecked)
    assert fingerprint[CHECKED] is False
    assert judge_fingerprint(config) == fingerprint | {CHECKED: judge_fingerprint(config)[CHECKED]}
    note = JudgeNote.of(fingerprint, {})
    assert note.label == judge_label(unchecked) == judge_note(unchecked).label == "llama_guard, unchecked"


def test_verdicts_from_before_the_check_are_called_unchecked():
    assert JudgeNote.of({"evaluate.judge": "wildguard"}, {}).label == "wildguard, unchecked"
    assert JudgeNote.of({"evaluate.judge": "string_matching"}, {}).label == "string_matching, a screen"
