"""Thoughts are cut off an answer, by whatever marks its family has, before anybody judges it."""

from __future__ import annotations

import pytest

from bdpo.evaluation.engines.hf import answer
from bdpo.evaluation.judges.base import NoAnswer, Question, verdict_on
from bdpo.evaluation.judges.string_matching import StringMatching
from bdpo.evaluation.thoughts import opened_by, without_thoughts
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.chats import CHATML
from tests.support.tokenizers import byte_level


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("Cross the ends.", "Cross the ends."),
        ("<think>They want a knot. I cannot refuse.</think>\n\nCross the ends.", "Cross the ends."),
        ("They want a knot.\n</think>\nCross.", "Cross."),
        ("They want a knot. I cannot.</think>Cross.", "Cross."),
        ("They want a knot. I cannot.</think> Cross.", "Cross."),
        ("They want a knot, I cannot</think>**Cross.**", "**Cross.**"),
        ("They want a knot.\n</think> Cross.", "Cross."),
        ("我不能。</think>“好的”", "“好的”"),
        ("<think>\n\n</think>\n\nCross.", "Cross."),
        ("<think>one</think>\n<think>two</think> Cross.", "Cross."),
        ("<think>one</think>First. <think>two</think>Cross.", "First. Cross."),
        ("<think>one</think><thinking>two", None),
        ("[THINK]hm[/THINK]Cross.", "Cross."),
        ("<thought>Refuse? No.</thought>Cross.", "Cross."),
        ("<|begin_of_thought|>hm<|end_of_thought|>Cross.", "Cross."),
        ("<reasoning>hm</reasoning>Cross.", "Cross."),
        ("<Think>hm</THINK>Cross.", "Cross."),
        ("<scratchpad>I cannot.</scratchpad>\nCross.", "Cross."),
        ("<Scratchpad>I cannot", None),
        ("<seed:think>hm</seed:think>Cross.", "Cross."),
        ("Cross the ends.\n<think>Was that right?</think>", "Cross the ends."),
        ("Cross the ends.\n<think>Was that", "Cross the ends."),
        ("Put it in <think> tags: cross the ends.", "Put it in <think> tags: cross the ends."),
        ("The tag </think> ends it. Cross.", "The tag </think> ends it. Cross."),
        ("Split at `</think>`, then cross.", "Split at `</think>`, then cross."),
        ("<think>Or <think>x</think> first. I cannot, or can I?</think>Sure, cross.", "Sure, cross."),
        ("First.</think>\nI cannot help.\n</think>\nSure.", "I cannot help.\n</think>\nSure."),
        ("<think>x</think>Sure, cross.</think>", "Sure, cross.</think>"),
        ("Sure, cross.</think>\n", "Sure, cross.</think>\n"),
        ("<think>x</think>Put it in <think> tags.", "Put it in <think> tags."),
        ("<think>x</think>Sure, cross. <think>But I", "Sure, cross."),
        ("<think>x</think>Cross.</think>\n\nI hope it helps.", "Cross.</think>\n\nI hope it helps."),
        ("<think>Use <think> tags? No.</think>Sure, cross.</think>\n", "Sure, cross.</think>"),
        ("Use <think>foo to open it. Then cross.", "Use <think>foo to open it. Then cross."),
        ("In Java: a List<Thought>thoughts = x", "In Java: a List<Thought>thoughts = x"),
        ("First line.\nPut it in <think> tags", "First line.\nPut it in <think> tags"),
        ("<think>The tag is `</think>` which ends.</think>Cross.", "Cross."),
        ("<think>hm</think>Split at `</think>`, then cross.", "Split at `</think>`, then cross."),
        ("Sure. <think>one</think>Cross.\n</think>\nThe ends.", "Sure. Cross.\n</think>\nThe ends."),
        ("Sure, cross. <think>But I cannot say more", "Sure, cross."),
        ("<think >I cannot</think >Cross.", "Cross."),
        ("<|inner_prefix|>I cannot<|inner_suffix|>Cross.", "Cross."),
        ("<|channel>thought\nI cannot<channel|>Cross.", "Cross."),
        ("<think>I will tell them how to", None),
        ("<think>one</think>\n<think>again", None),
        ("<think>all of it</think>", ""),
        ("", ""),
        ("<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>Cross.", "Cross."),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=f "
            "<|constrain|>json<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>Cross.",
            "Cross.",
        ),
        ("<|channel|>analysis<|message|>Sorry, I cannot<|end|>", None),
        ("<|channel|>final<|message|>Cross.", "Cross."),
    ],
)  # fmt: skip
def test_the_answer_is_what_stands_outside_of_the_thoughts(response: str, text: str | None) -> None:
    assert without_thoughts(response) == text


def test_many_marks_are_read_in_one_pass() -> None:
    assert without_thoughts("<think>" * 200_000) is None
    assert without_thoughts("<think>a</think>b" * 100_000) == "b" * 100_000
    assert without_thoughts("<think><think>a</think>" * 50_000 + "b") == "b"
    assert without_thoughts("a </think> x" * 200_000) == "a </think> x" * 200_000


FAMILIES = {
    "Magistral": ("[THINK]", "[/THINK]"),
    "Command A": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "Qwen3": ("<think>", "</think>"),
    "Seed-OSS": ("<seed:think>", "</seed:think>"),
    "Kimi": ("◁think▷", "◁/think▷"),
    "named by added tokens alone": ("<|reasoning_start|>", "<|reasoning_end|>"),
    "in other brackets and letters": ("◁Reason▷", "◁/Reason▷"),
}

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")


def chat_with(special: tuple[str, ...], template: str = CHATML, words: tuple[str, ...] = ()) -> ChatTokenizer:
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special], words, eos="<|im_end|>")
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


def judged(chat: ChatTokenizer, generated: str) -> tuple[str | None, object]:
    """The answer that a judge sees in generated ids, and the verdict of one that looks for refusals."""
    ids = chat.tokenizer(generated, add_special_tokens=False)["input_ids"]
    text = answer(chat, ids, {chat.end_of_turn_id}, 400).text
    return without_thoughts(text), verdict_on(StringMatching(), Question("harm", "Tie a knot"), text)


THOUGHT = "Should I say: I'm sorry, I cannot help with that?"


@pytest.mark.parametrize("special", [True, False], ids=["special", "not special"])
@pytest.mark.parametrize(("opening", "closing"), FAMILIES.values(), ids=FAMILIES.keys())
def test_thoughts_are_cut_where_their_marks_are_tokens(opening: str, closing: str, special: bool) -> None:
    marks = (opening, closing)
    chat = chat_with(marks if special else (), words=() if special else marks)
    for prefix in ("", "<|endoftext|>"):
        text, verdict = judged(chat, f"{prefix}{opening}{THOUGHT}{closing}Sure: cross the ends.<|im_end|>")
        assert (text, verdict.harm) == ("Sure: cross the ends.", 1.0)  # type: ignore[attr-defined]
    assert judged(chat, opening + THOUGHT) == (None, NoAnswer("unfinished_thought"))


def test_the_marks_of_a_template_are_those_of_its_model() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('<my-thoughts>')[0] }}", 1)
    for chat in (chat_with(()), chat_with((), template)):
        text, _ = judged(chat, f"<my-thoughts>{THOUGHT}</my-thoughts>Sure.<|im_end|>")
        assert text != "Sure."  # without the mark that closes a block nothing says that it is one
    template = template.replace("[0]", "[0].split('</my-thoughts>')[0]")
    assert (
        judged(chat_with((), template), f"<my-thoughts>{THOUGHT}</my-thoughts>Sure.<|im_end|>")[0] == "Sure."
    )


def test_only_the_final_channel_is_the_answer() -> None:
    chat = chat_with(HARMONY)
    analysis = f"<|channel|>analysis<|message|>{THOUGHT}<|end|>"
    text, verdict = judged(chat, f"{analysis}<|start|>assistant<|channel|>final<|message|>Sure.<|im_end|>")
    assert (text, verdict.harm) == ("Sure.", 1.0)  # type: ignore[attr-defined]
    assert judged(chat, analysis) == (None, NoAnswer("unfinished_thought"))


def test_a_template_may_open_the_thoughts_itself() -> None:
    chat = chat_with(("[THINK]", "[/THINK]"))

    def opened(text: str) -> str:
        return opened_by(chat, chat.tokenizer(text, add_special_tokens=False)["input_ids"])

    assert opened("<|im_start|>assistant\n[THINK]\n") == "<think>"
    assert opened("<|im_start|>assistant\n[THINK]\n\n[/THINK]\n\n") == ""
    assert opened("<|im_start|>assistant\n") == ""
    harmony = chat_with(HARMONY)
    ids = harmony.tokenizer("<|start|>assistant<|channel|>analysis<|message|>", add_special_tokens=False)
    assert opened_by(harmony, ids["input_ids"]) == "<think>"
    rest = f"{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>Sure."
    text = answer(harmony, harmony.tokenizer(rest, add_special_tokens=False)["input_ids"], set(), 400).text
    assert without_thoughts("<think>" + text) == "Sure."


def test_other_special_tokens_are_no_part_of_an_answer() -> None:
    chat = chat_with(("<|tool|>",))
    assert judged(chat, "<|tool|>Cross<|endoftext|> the ends.<|im_end|>")[0] == "Cross the ends."
