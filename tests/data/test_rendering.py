"""Pairs -> token ids within the lengths, as the chat tokenizer makes them one at a time."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.data.formats.base import BadRow, Pair, answer, question
from bdpo.data.rendering import encode_pairs, render_pair
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.chats import CHATML, byte_tokenizer

TRIMS = CHATML.replace("m.content", "m.content | trim")

TEXTS = st.text(max_size=20)


@functools.cache  # not one an example of Hypothesis
def chat_of(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


@pytest.mark.parametrize("template", [CHATML, TRIMS])
@given(TEXTS, TEXTS, st.integers(1, 60), st.integers(1, 40))
def test_ids_and_lengths(template, chosen, rejected, max_prompt_length, room):
    chat, messages = chat_of(template), [question("Why?")]
    prompt, right = chat.prompt_ids(messages), [chat.response_ids(text) for text in (chosen, rejected)]
    max_length = max_prompt_length + room
    data = SimpleNamespace(max_prompt_length=max_prompt_length, max_length=max_length)
    (encoded,) = encode_pairs(chat, [Pair(messages, answer(chosen), answer(rejected))], data)
    cut = [response[: max_length - len(prompt)] for response in right]
    if len(prompt) > max_prompt_length:
        assert str(encoded) == "prompt: longer than max_prompt_length"
    elif right[0] == right[1]:
        assert str(encoded) == "chosen equals rejected as the chat template writes them"
    elif cut[0] == cut[1]:
        assert str(encoded) == "chosen equals rejected within max_length"
    else:
        assert (encoded[0].prompt, encoded[0].chosen, encoded[0].rejected) == (prompt, *cut)


def test_a_pair_that_cannot_be_rendered_takes_no_other_with_it():
    chat = chat_of("{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    data = SimpleNamespace(max_prompt_length=100, max_length=200)
    pairs = [Pair([question(text)], answer("a"), answer("b")) for text in ("yes", "no", "maybe")]
    first, refused, last = encode_pairs(chat, pairs, data)
    assert isinstance(refused, BadRow)
    assert [one[0].prompt for one in (first, last)] == [chat.prompt_ids(pairs[i].prompt) for i in (0, 2)]


THINKS = CHATML.replace(
    "m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)"
)

OWN_TOKENS = "the token </s> ends a turn"


@pytest.mark.parametrize(
    ("template", "prompt", "chosen", "changed"),
    [
        (CHATML, ["q", "a", "q"], " b\n", False),
        (CHATML, ["q", OWN_TOKENS, "q"], OWN_TOKENS, False),
        (TRIMS, [" q ", "a\n", "q"], " b ", False),
        (THINKS, ["q", "a", "q"], "b", False),
        (THINKS, ["q", "<think>hm</think>a", "q"], "b", True),
        (THINKS, ["q"], "<think>hm</think>b", True),
        (CHATML.replace("m.content", "m.content[:12]"), ["q" * 13], "b", True),
        (CHATML.replace("m.content", "m.content.replace('bad', '***')"), ["q", "bad", "q"], "b", True),
        (
            CHATML.replace("m.content", "(m.content if m.content != 'c' or m.role == 'user')"),
            ["c", "c", "q"],
            "b",
            True,
        ),
    ],
)
def test_texts_that_the_template_writes_otherwise_are_noticed(template, prompt, chosen, changed):
    """All but the spaces at both ends."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(prompt)]
    pair = Pair(messages, answer(chosen), answer("no"))
    assert render_pair(chat_of(template), pair).changed == changed


def test_a_system_turn_may_stand_in_the_last_question():
    """So it does in Mistral's template."""
    system = (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% if m == asked[-1] and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    )
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    template = template.replace("{{ m.content }}", system + "{{ m.content }}")
    prompt = [{"role": "system", "content": "Be kind."}, question("q"), answer("a"), question("r")]
    rendered = render_pair(chat_of(template), Pair(prompt, answer("b"), answer("c")))
    assert (rendered.changed, rendered.prompt.count("Be kind.\nr<|im_end|>")) == (False, 1)


def test_a_system_turn_that_the_answer_takes_away_is_a_reason():
    """The template writes it into the last turn of all, which is the question until there is an answer."""
    system = (
        "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n{% endif %}"
    )
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    chat = chat_of(template.replace("{{ m.content }}", system + "{{ m.content }}"))
    prompt = [{"role": "system", "content": "Be kind."}, question("q")]
    with pytest.raises(BadRow, match="chosen: the chat template writes the prompt"):
        render_pair(chat, Pair(prompt, answer("b"), answer("c")))


SYSTEM_OPENS_A_THOUGHT = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and messages[0].role == 'system' %}<think></think>{% endif %}"
    "{{ m.content }}",
)

NO_THINK = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if '/no_think' in messages[-1].content %}<think></think>{% endif %}{% endif %}",
)


def test_a_response_is_what_the_template_writes_behind_this_prompt():
    """A template may write more before an answer because of a turn that few rows have."""
    chat, system = chat_of(SYSTEM_OPENS_A_THOUGHT), {"role": "system", "content": "Be kind."}
    rows = [Pair(prompt, answer("a"), answer("b")) for prompt in ([question("q")], [system, question("q")])]
    plain, thinking = (render_pair(chat, pair) for pair in rows)
    assert (plain.chosen, plain.changed) == ("a", False)
    assert (thinking.chosen, thinking.rejected) == ("<think></think>a", "<think></think>b")
    assert thinking.changed


def test_a_word_that_changes_the_generation_prompt_alone_is_a_reason():
    chat = chat_of(NO_THINK)
    assert render_pair(chat, Pair([question("q")], answer("a"), answer("b"))).chosen == "a"
    with pytest.raises(BadRow, match="chosen: the chat template writes the prompt or the end of the turn"):
        render_pair(chat, Pair([question("/no_think q")], answer("a"), answer("b")))
