"""Answers have the ids of the rendered conversation, also where these depend on what stands beside them."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from bdpo.config import DataConfig
from bdpo.data.fidelity import require_faithful_pairs
from bdpo.data.formats.base import Pair, answer, question
from bdpo.data.prepare import prepare
from bdpo.data.rendering import encode_pairs
from bdpo.models.placed_texts import PlacedTexts
from bdpo.models.tokenizer import ChatTokenizer, require_faithful_template
from tests.support.data_files import pair_row, write_jsonl
from tests.support.template_shapes import SHAPES
from tests.support.tokenizers import byte_level, sentence_piece

ANSWERS = ["Because.", " Because.", "Because.\n", "\nBecause", "  two ", "B<|end|> x", "é\t", "x"]

LIMITS = DataConfig(path="x", max_length=4000, max_prompt_length=2000)


def with_prefix_space(special, bos, eos):
    tokenizer = byte_level(special, bos=bos, eos=eos)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


KINDS = {
    "SentencePiece": lambda *of: sentence_piece(*of),
    "a normalizer": lambda *of: sentence_piece(*of, prepend="normalizer"),
    "Phi-3": lambda *of: sentence_piece(*of, prepend="normalizer", takes=["rstrip"]),
    "Phi-4": lambda special, *named: byte_level(special, (), *named, takes=["lstrip", "rstrip"]),
    "lstrip": lambda special, *named: byte_level(special, (), *named, takes=["lstrip"]),
    "a space before bytes": with_prefix_space,
}


def chat_of(kind, name):
    shape = SHAPES[name]
    tokenizer = KINDS[kind](list(shape.special), shape.bos, shape.eos)
    tokenizer.chat_template = shape.template
    return ChatTokenizer(tokenizer, shape.kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-2", "llama-3", "phi-3", "phi-4", "vicuna", "zephyr", "smollm2"])
def test_the_ids_are_those_of_the_rendered_conversation(kind, name):
    chat = chat_of(kind, name)
    require_faithful_template(chat)
    texts = [text for text in ANSWERS if not chat.template.is_templated(text)]
    pairs = [Pair([question(" Why? \n")], answer(text), answer("never")) for text in texts]
    for pair, encoded in zip(pairs, encode_pairs(chat, pairs, LIMITS), strict=True):
        whole = chat.template.render([*pair.prompt, pair.chosen], generate=False)
        ours = encoded[0].prompt + encoded[0].chosen
        assert chat.text_ids(whole)[: len(ours)] == ours
        assert chat.is_faithful(pair.prompt, pair.chosen["content"])


@pytest.mark.parametrize("kind", ["Phi-3", "Phi-4"])
def test_spaces_that_an_added_token_takes_are_in_no_answer(kind):
    chat = chat_of(kind, "phi-3" if kind == "Phi-3" else "phi-4")
    assert chat.response_ids(" \nBecause.") == chat.response_ids("Because.")
    assert (chat.response_ids("Because.\n") == chat.response_ids("Because.")) == (kind == "Phi-4")
    assert chat.decode(chat.prefill_ids(" Sure")).strip() == "Sure"
    assert chat.prefill_ids("Sure") == chat.response_ids("Sure")[:-1]


def test_answers_that_differ_in_such_spaces_alone_are_equal():
    pair = Pair([question("q")], answer("yes"), answer(" yes"))
    assert [str(one) for one in encode_pairs(chat_of("Phi-3", "phi-3"), [pair], LIMITS)] == [
        "chosen equals rejected as the chat template writes them"
    ]


def test_an_answer_without_ids_of_its_own_is_quarantined_alone(tmp_path, kept_pairs, monkeypatch):
    """A tokenizer that merges one answer with the header before it: its text would be another alone."""
    right = PlacedTexts.between

    def merges(self, before, text, behind=""):
        return None if text.startswith("odd") else right(self, before, text, behind)

    monkeypatch.setattr(PlacedTexts, "between", merges)
    chat = chat_of("a space before bytes", "phi-3")
    rows = [pair_row(0), pair_row(1, rejected="odd"), pair_row(2, chosen="odd"), pair_row(3)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    account = prepare(
        DataConfig(path=str(file), max_bad_fraction=1.0), chat, tmp_path / "pairs", tmp_path / "private", 0
    )
    assert dict(account.quarantined) == {
        f"{side}: its tokens merge with those that the chat template writes beside it": 1
        for side in ("chosen", "rejected")
    }
    assert require_faithful_pairs(chat, kept_pairs(), LIMITS) == 2
