"""Texts that are cut into words have the ids that the tokenizer itself gives them."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from bdpo.models import word_ids as module
from bdpo.models.word_ids import word_ids
from tests.support.tokenizers import byte_level, sentence_piece

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
HARMONY = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"{CONTRACTIONS}?|\p{{N}}{{1,3}}|{REST}"
)
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",  # finds nothing in most texts
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def split(*expressions: str) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer that cuts by some expressions, one after the other."""
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SHAPES = {
    "GPT-2": GPT2,
    "Llama 3": split(LLAMA3),
    "Qwen": split(LLAMA3.replace("{1,3}", "")),
    "gpt-oss": split(HARMONY),
    "DeepSeek": split(*DEEPSEEK),
    "StarCoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "gaps": split(r"\p{L}{2,3}"),
}

TOKENS = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "<think>", "<｜User｜>"]

CHARACTERS = bytes(range(256)).decode("cp1252", "ignore")

PIECES = st.one_of(
    st.sampled_from(
        [*TOKENS, "<|im", "_end|>", "'s", "'LL", "’ve", "  ", "\n\n", "\r\n", " \t", "\x1c", "12"]
    ),
    st.text(CHARACTERS, max_size=4),
    st.text("aB1 \n'!", max_size=8),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@cache
def backend(shape: str, nfc: bool = False) -> Tokenizer:
    """A tokenizer of a shape; many of its merges cross the ends of words, so that no wrong cut is hidden."""
    rng = random.Random(0)
    pieces = [
        "a",
        "B",
        "é",
        "s",
        "1",
        "23",
        " ",
        "\n",
        "\t",
        "\r",
        "\x1c",
        "'",
        "’",
        "!",
        "<",
        "|",
        "²",
        "ª",
        "·",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, max_token_length=6, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(("".join(rng.choices(pieces, k=12)) for _ in range(2000)), trainer)
    tokenizer.pre_tokenizer = SHAPES[shape]
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special="im" in token) for token in TOKENS])
    return tokenizer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nfc", [False, True])
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_the_ids_are_those_of_the_tokenizer(shape, nfc, text):
    right = backend(shape, nfc).encode(text, add_special_tokens=False).ids
    words = word_ids_of(shape, nfc)
    assert words.ids(text) == (None if "｜" in text else right)
    assert words.ids(text) in (None, right), "the second time it knows the words"


@cache
def word_ids_of(shape: str, nfc: bool) -> module.WordIds:
    """The words of a tokenizer, once."""
    found = word_ids(backend(shape, nfc))
    assert found is not None
    return found


@pytest.mark.parametrize("text", ["中", "e\u0301", "a\u2009b", "\ufdd0", "\x81", "😊", "\ud800"])
def test_a_text_of_other_characters_is_left_to_the_tokenizer(text):
    assert word_ids_of("GPT-2", False).ids(f"a {text}") is None


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # a text is one word
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), GPT2]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), GPT2]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(" "), "removed"), GPT2]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(" "), "isolated", invert=True), GPT2]),
        split(r"(a|b)|\s"),  # a group
        split("[[:alpha:]]+"),
        split(r"\p{Han}+"),
        split(r"\p{^L}+"),
        split(r"[\S]+"),
        split(r"\h+"),
        split(r"\s*"),
    ],
)
def test_a_tokenizer_that_cuts_in_another_way_is_left_alone(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    assert word_ids(tokenizer) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
        lambda tokenizer: setattr(tokenizer, "model", models.WordLevel()),
        lambda tokenizer: setattr(tokenizer, "model", models.BPE(dropout=0.1)),
        lambda tokenizer: setattr(tokenizer, "encode_special_tokens", True),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<l>", lstrip=True)]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<r>", rstrip=True)]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<w>", single_word=True)]),
        lambda tokenizer: tokenizer.add_tokens(
            [AddedToken("<n>", normalized=True), AddedToken("<o>", normalized=False)]
        ),
    ],
)
def test_a_tokenizer_that_does_more_is_left_alone(change):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = GPT2
    assert word_ids(tokenizer) is not None
    change(tokenizer)
    assert word_ids(tokenizer) is None


def test_the_tokenizers_of_other_families_are_left_alone():
    assert word_ids(byte_level(["<s>"]).backend_tokenizer) is None
    assert word_ids(sentence_piece(["<s>"]).backend_tokenizer) is None


@pytest.mark.parametrize(
    "wrong",
    [
        (r"\s+(?!\S)|", ""),
        (r"\p{N}", r"\p{Nd}"),
        ("[sdmt]", "[sdm]"),
        ("|ve", ""),
        ("'(?:", "(?i:'"),
        (r" ?\p{L}+", r"[^\S]?\p{L}+"),
        (r"(?!\S)", r"(?!\p{L})"),
    ],
)
def test_an_expression_that_cuts_in_another_way_is_found_by_the_probes(monkeypatch, wrong):
    monkeypatch.setattr(module, "_BYTE_LEVEL", module._BYTE_LEVEL.replace(*wrong))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = GPT2
    assert word_ids(tokenizer) is None


def test_a_class_that_is_not_pythons_is_found_by_the_probes(monkeypatch):
    monkeypatch.setitem(module._CLASSES, r"\s", module._CLASSES[r"\s"] + "\x1c")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = GPT2
    assert word_ids(tokenizer) is None


@pytest.mark.parametrize("steps", [[GPT2], []])
def test_an_expression_with_a_group_is_left_to_the_tokenizer(steps):
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"(\p{N}{1,3})"), "isolated")
    last = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, *steps, *([] if steps else [last])])
    assert word_ids(tokenizer) is None


def test_few_and_short_words_are_kept(monkeypatch):
    tokenizer = backend("GPT-2")
    words = word_ids(tokenizer)
    monkeypatch.setattr(module, "_MOST_WORDS", len(words) + 2)
    monkeypatch.setattr(module, "_LONGEST_WORD", 4)
    text = "aaaaa a aa aB aBs B"
    right = tokenizer.encode(text, add_special_tokens=False).ids
    assert words.ids(text) == words.ids(text) == right
    assert words.keys() - {*TOKENS} == {" a", " aa"}
