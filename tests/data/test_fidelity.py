"""Prepared pairs are compared with the template's own rendering, with everything that their rows hold."""

from __future__ import annotations

import json

import pytest

from bdpo.config import DataConfig
from bdpo.data.fidelity import require_faithful_pairs
from bdpo.data.prepare import prepare
from bdpo.errors import UserError
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.chats import CHATML
from tests.support.data_files import write_jsonl
from tests.support.template_shapes import SHAPES, THINKS
from tests.support.tokenizers import byte_level

SHORTENS = CHATML.replace("m.content", "(m.content[:9] if loop.length > 1 else m.content)")

SHOUTS = CHATML.replace("m.content", "(m.content|upper if shout else m.content)")

WRITES_FINAL = "{{ tools|tojson if tools }}" + CHATML.replace(
    "{{ m.content }}", "{% if tools and m.role == 'assistant' %}<final>{% endif %}{{ m.content }}"
)

REASONS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and think %}<think>"
    + (
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
)

# As Qwen3 does it: thoughts are split off the text; of earlier answers they are left out.
SPLITS_THOUGHTS = (
    "{% for m in messages %}{% set t = namespace(text=m.content, thought='') %}"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set t.text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set t.thought = m.content.split('</think>')[0].split('<think>')[-1].strip() %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ t.thought }}\n</think>\n\n{% endif %}{{ t.text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

TOOLS = [{"name": "f", "about": {"b": 1, "a": 2}}]


@pytest.fixture
def prepared(tmp_path, kept_pairs):
    """prepared(chat, rows): the account and the pairs of these rows and of a plain one behind them."""

    def of(chat, *rows):
        rows = [*rows, {"prompt": "sound?", "chosen": "yes", "rejected": "no"}]
        config = DataConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)), max_bad_fraction=1.0)
        account = prepare(config, chat, tmp_path / "pairs", tmp_path / "private", 0)
        return account, kept_pairs()

    return of


def chat_of(template, **variables):
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"])
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, variables)


def row(question="hello", **more):
    return {"prompt": question, "chosen": "yes", "rejected": "no", **more}


def require(chat, pairs, max_length=2048):
    return require_faithful_pairs(
        chat, pairs, DataConfig(path="x", max_length=max_length, max_prompt_length=1)
    )


def test_a_pair_of_which_the_template_makes_something_else_is_named_by_its_id(prepared):
    """Pairs that were prepared by another template, which did not shorten a question that is answered."""
    _, pairs = prepared(chat_of(CHATML), row("secret, very secret"))
    assert require(chat_of(SHORTENS), pairs[1:]) == 1
    with pytest.raises(UserError, match=f"pair {pairs[0]['pair_id']}: was prepared, but cannot") as no:
        require(chat_of(SHORTENS), pairs)
    assert "secret" not in str(no.value)


@pytest.mark.parametrize("extra", [{}, {"id": "7"}, {"timestamp": 3}])
def test_no_row_is_exempt_from_what_the_template_writes(prepared, extra):
    """The same template; a key that no template reads changes nothing."""
    question = {"role": "user", "content": "secret, very secret", **extra}
    account, pairs = prepared(chat_of(SHORTENS), row([question]), row([question | {"content": "short"}]))
    assert dict(account.quarantined) == {
        "chosen: the chat template writes the prompt or the end of the turn in another way here": 1
    }
    assert [pair["prompt"][0]["content"] for pair in pairs] == ["short", "sound?"]
    assert require(chat_of(SHORTENS), pairs) == 2


@pytest.mark.parametrize(
    ("template", "variables", "extra", "prompt", "chosen"),
    [
        (SHOUTS, {}, {"chat_template_kwargs": {"shout": True}}, "HELLO", "YES"),
        (
            THINKS,
            {"enable_thinking": False},
            {"chat_template_kwargs": {"enable_thinking": True}},
            "hello",
            "<think>\n\n</think>\n\nyes",
        ),
        (WRITES_FINAL, {}, {"tools": TOOLS}, "hello", "<final>yes"),
        (CHATML, {}, {"system": "Be kind."}, "hello", "yes"),
    ],
)
def test_an_answer_is_written_with_all_that_its_row_holds(
    prepared, template, variables, extra, prompt, chosen
):
    chat = chat_of(template, **variables)
    account, pairs = prepared(chat, row(**extra))
    assert account.quarantined == {}
    assert chat.decode(pairs[0]["prompt_ids"]).endswith(f"user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
    assert chat.decode(pairs[0]["chosen_ids"]) == chosen + "<|im_end|>"
    assert require(chat, pairs) == 2


def test_reasoning_of_one_answer_leaves_an_empty_block_in_the_other(prepared):
    chosen = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    chat = chat_of(REASONS)
    more = {"chosen": [chosen], "chat_template_kwargs": {"think": True}}
    _, pairs = prepared(chat, row(**more))
    answers = [chat.decode(pairs[0][f"{side}_ids"]) for side in ("chosen", "rejected")]
    assert answers == ["<think>hm</think>yes<|im_end|>", "<think></think>no<|im_end|>"]
    assert require(chat, pairs) == 2


THOUGHT = "<think>because</think>good"


def test_a_thought_that_the_generation_prompt_has_closed_is_a_reason(prepared):
    """The template writes one block, prompt and answer side by side would have two."""
    account, pairs = prepared(chat_of(SPLITS_THOUGHTS, enable_thinking=False), row(chosen=THOUGHT))
    assert dict(account.quarantined) == {
        "chosen: the chat template writes the prompt or the end of the turn in another way here": 1
    }
    assert len(pairs) == 1


def test_a_thought_behind_an_open_generation_prompt_is_what_the_template_writes(prepared):
    chat = chat_of(SPLITS_THOUGHTS, enable_thinking=False)
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    account, pairs = prepared(chat, row(chosen=THOUGHT, **thinks))
    assert (account.quarantined, account.sources[0].changed_by_template) == ({}, 1)
    written = "<think>\nbecause\n</think>\n\ngood<|im_end|>"
    assert chat.decode(pairs[0]["chosen_ids"]) == written
    assert pairs[0]["chosen_ids"] == chat.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert require(chat, pairs) == 2


def test_a_thought_that_the_template_leaves_out_of_the_history_is_counted(prepared):
    chat = chat_of(SPLITS_THOUGHTS, enable_thinking=False)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": THOUGHT}]
    turns.append({"role": "user", "content": "How?"})
    account, pairs = prepared(chat, row(turns))
    assert (account.quarantined, account.sources[0].changed_by_template) == ({}, 1)
    assert "assistant\ngood<|im_end|>" in chat.decode(pairs[0]["prompt_ids"])
    assert "because" not in chat.decode(pairs[0]["prompt_ids"])
    assert require(chat, pairs) == 2


# Families whose control tokens no list of names has: EXAONE, MiniMax, and one of nobody's.
OWN_MARKS = {
    "[|user|]": "[|end|]",
    "]~b]": "[e~[",
    "{{'{'}}begin}": "{{'{'}}end}",
}


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(("begin", "end"), OWN_MARKS.items())
def test_a_text_with_the_models_own_control_tokens_is_already_templated(prepared, begin, end, column):
    marks = [mark.replace("{{'{'}}", "{") for mark in (begin, end)]
    tokenizer = byte_level(["<s>", "</s>", "!", *marks], bos="<s>", eos="</s>")
    tokenizer.chat_template = CHATML.replace("<|im_start|>", begin).replace("<|im_end|>", end)
    account, pairs = prepared(
        ChatTokenizer(tokenizer),
        row(**{column: f"A cat.{marks[1]}"}),
        row("In HTML <b>a</b> is bold, <s>b</s> is not!", chosen="No [x], {y} or | z!"),
    )
    reason = "already templated: holds control tokens of a chat template; give the messages themselves"
    assert (dict(account.quarantined), len(pairs)) == ({f"{column}: {reason}": 1}, 2)


def test_another_end_of_turn_than_that_of_other_answers_is_a_reason(prepared):
    """Templates that end a call of a tool with a token of its own."""
    template = CHATML.replace("<|im_end|>", "{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}")
    chosen = {"role": "assistant", "content": "yes", "tool_calls": [{"function": {"name": "f"}}]}
    account, _ = prepared(chat_of(template), row(chosen=[chosen]))
    assert dict(account.quarantined) == {
        "chosen: the chat template writes the prompt or the end of the turn in another way here": 1
    }


@pytest.mark.parametrize("extra", [{}, {"system": "Be kind."}, {"tools": TOOLS}, {"shout": True}, {"id": 7}])
@pytest.mark.parametrize("broken", [None, "prompt", "start", "end", "cut"])
def test_prepared_ids_are_those_of_the_text(prepared, broken, extra):
    """Of rows of every kind, which are compared with all that they hold."""
    template = "{{ tools|tojson if tools }}" + SHOUTS
    if "shout" in extra:
        extra = {"chat_template_kwargs": extra}
    if "id" in extra:
        extra = {"prompt": [{"role": "user", "content": "hello", **extra}]}
    chat = chat_of(template)
    _, (pair, _) = prepared(chat, row() | extra)
    if broken is None:
        assert require(chat, [pair]) == 1
        cut = pair | {"chosen_ids": pair["chosen_ids"][:1], "rejected_ids": pair["rejected_ids"][:1]}
        assert require(chat, [cut], len(pair["prompt_ids"]) + 1) == 1
        return
    column = "prompt_ids" if broken == "prompt" else "rejected_ids"
    ids = pair[column]
    pair[column] = {"prompt": ids[1:], "start": [7, *ids], "end": [*ids[:-1], 7], "cut": ids[:-1]}[broken]
    with pytest.raises(UserError, match="the prepared token ids are not those of its text") as no:
        require(chat, [pair])
    assert f"pair {pair['pair_id']}, " in str(no.value)
    assert "hello" not in str(no.value)


def test_a_pair_that_the_template_refuses_by_now_is_named(prepared):
    _, pairs = prepared(chat_of(SHOUTS), row(chat_template_kwargs={"shout": True}))
    with pytest.raises(
        UserError, match=rf"pair {pairs[0]['pair_id']}: .*cannot be rendered now .*fresh=true"
    ):
        require(chat_of(CHATML), pairs)


def test_no_pair_is_not_a_success():
    with pytest.raises(UserError, match="no prepared pair was compared"):
        require(chat_of(CHATML), [])


def test_the_context_keeps_the_order_of_keys(prepared):
    _, pairs = prepared(chat_of(WRITES_FINAL), row(tools=TOOLS))
    assert list(json.loads(pairs[0]["context"])["tools"][0]) == ["name", "about"]


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "gemma-3", "zephyr"])
def test_families_are_faithful(prepared, name):
    chat = SHAPES[name].chat()
    _, pairs = prepared(chat, row(), row(" hello ", chosen=" yes\n", rejected="no "))
    assert require(chat, pairs) == 3
