"""Texts -> token ids, word by word: most words of a text are those of others, whose ids are known.

A byte-level tokenizer cuts a text at its added tokens and then, by regular expressions, into words; the ids
of a word depend on nothing else. Most of its time is the cutting, which Python's `re` does faster. That is
done for texts of the characters of Windows-1252 (ASCII, Western European letters, typographic signs), of
which each class in such an expression is written out. Other texts are left to the tokenizer, and so are all
texts if it is of another shape or cuts a probe in another way.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from itertools import chain, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHARACTERS = bytes(range(256)).decode("cp1252", "ignore")

# Python's own `\s` has the separators U+001C to U+001F, too. No class is empty: U+FDD0 is in no such text.
_CLASSES = {r"\s": "\t\n\x0b\x0c\r \x85\xa0"} | {
    rf"\p{{{name}}}": "\ufdd0" + "".join(c for c in _CHARACTERS if unicodedata.category(c).startswith(name))
    for name in ("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S")
}

_BYTE_LEVEL = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's

# Every sequence of four characters of some kinds, and every character beside some.
_PROBES = (
    "".join(chain.from_iterable(product(" \n\r'sL1!", repeat=4))),
    "".join(f"a{c}a {c}B1{c}1\n{c}\n!{c}!{c}{c} '{c} L{c}'{c}L" for c in _CHARACTERS),
    "we'll we've we're WE'LL WE'VE WE'RE",
)

_MOST_WORDS, _LONGEST_WORD = 2**17, 64  # others are not kept


class WordIds(dict[str, tuple[int, ...]]):
    """The ids of the added tokens and of the words seen so far. All `expressions` cut a text, in turn."""

    def __init__(self, backend: Tokenizer, expressions: list[str]) -> None:
        from tokenizers import pre_tokenizers

        tokens = {token.content: (number,) for number, token in backend.get_added_tokens_decoder().items()}
        super().__init__(tokens)
        longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self._cuts = [re.compile(_of_python(expression)) for expression in expressions]
        self._model = backend.model
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> tuple[int, ...]:
        ((written, _),) = self._bytes.pre_tokenize_str(word)
        ids = tuple(token.id for token in self._model.tokenize(written))
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids

    def ids(self, text: str) -> list[int] | None:
        """The ids of a text; None if it has other characters than those of Windows-1252."""
        if not text.isascii():
            try:
                text.encode("cp1252")
            except UnicodeEncodeError:
                return None
        words: list[str] = []
        for number, piece in enumerate(self._added.split(text)):  # every second one is an added token
            words += [piece] if number % 2 else self.cut(piece)
        return [*chain.from_iterable(map(self.__getitem__, words))]

    def cut(self, text: str) -> list[str]:
        """The words of a text without added tokens."""
        words = [text]
        for cut in self._cuts:
            words = [*chain.from_iterable(map(cut.findall, words))]
        return words


def word_ids(backend: Tokenizer) -> WordIds | None:
    """The words of a tokenizer; None if it is of another shape or cuts texts in another way."""
    from tokenizers import models, normalizers

    added = backend.get_added_tokens_decoder().values()
    if (
        not isinstance(backend.model, models.BPE)
        or backend.model.dropout
        or not isinstance(backend.normalizer, normalizers.NFC | None)  # it leaves such texts as they are
        or backend.encode_special_tokens
        or any(token.lstrip or token.rstrip or token.single_word for token in added)
        or len({token.normalized for token in added}) > 1  # one kind is looked for before the other
        or not (expressions := _expressions(backend.pre_tokenizer))
    ):
        return None
    try:
        with warnings.catch_warnings(action="error"):
            words = WordIds(backend, expressions)
    except (KeyError, re.error, FutureWarning):  # a class that is not written out, or no syntax of Python's
        return None
    if any(cut.groups for cut in words._cuts):  # `findall` would find what is in the group alone
        return None
    for probe in _PROBES:
        spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(probe)]
        if words.cut(probe) != [probe[begin:end] for begin, end in spans]:
            return None
    return words


def _expressions(pre_tokenizer: Any) -> list[str]:
    """The expressions by which a byte-level pre-tokenizer cuts texts; none if it is another or does more."""
    state = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else {}
    *steps, last = state.get("pretokenizers", [state])
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return []
    found = [_BYTE_LEVEL] if last["use_regex"] else []
    for step in reversed(steps):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                found.insert(0, r"\p{N}|[^\p{N}]+")
            case {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}:
                found.insert(0, text)
            case _:
                return []
    return found


def _of_python(expression: str) -> str:
    """An expression of Oniguruma's in Python's syntax, which finds what lies between its finds, too."""
    brackets = r"(\[(?:\\.|[^\]\\])*\])"
    text = expression.replace(r"\S", r"[^\s]")
    text = re.sub(rf"{brackets}|\\s|\\p{{\w+}}", lambda found: found[1] or f"[{found[0]}]", text)
    text = re.sub(r"\\s|\\p{\w+}", lambda found: re.escape(_CLASSES[found[0]]), text)
    return f"(?:{text})|(?:(?!{text})(?s:.))+"
