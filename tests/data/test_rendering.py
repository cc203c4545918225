"""Pairs -> token ids within the lengths, as the chat tokenizer makes them one at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.data.formats.base import BadRow, Pair, answer, question
from bdpo.data.rendering import encode_pairs
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.chats import CHATML, byte_tokenizer

TRIMS = CHATML.replace("m.content", "m.content | trim")

TEXTS = st.text(max_size=20)


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
