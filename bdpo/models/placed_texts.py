"""Texts -> token ids, alone or in their place between two others.

Most tokenizers give a text the same ids wherever it stands. Some do not: SentencePiece puts a space before a
text that begins, and an added token may take the spaces beside it (`lstrip` and `rstrip` of its AddedToken),
as those of Phi-3 and Phi-4 do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bdpo.models.template import GUARD, PROBE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEWLINE = "\n"
"""A text of its own that no piece of a word merges with."""


class PlacedTexts:
    """A tokenizer, asked for the ids of a text in its place. No special tokens are added."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {"": []}

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def neighbour(self, text: str) -> list[int]:
        """The ids of a text that stands beside many others, which are made once."""
        if text not in self._known:
            self._known[text] = self.ids(text)
        return self._known[text]

    def guarded(self, text: str, before: Sequence[str], behind: str = "") -> list[int]:
        """The ids of a text between two others, where two tokens end at every guard; see `between`.

        They are those of the text alone if it takes something of all texts of `before`.
        """
        pieces = text.split(GUARD)
        last, ids = len(pieces) - 1, []
        for number, piece in enumerate(pieces):
            others = (NEWLINE,) if number else before
            found = self.between(others, piece, behind if number == last else "")
            ids += self.ids(piece) if found is None else found
        return ids

    def between(self, before: Sequence[str], text: str, behind: str = "") -> list[int] | None:
        """The ids of a text behind the first of some texts of which it takes nothing; None if there is none.

        `behind` is what follows the text. A newline before a text is left out if the tokenizer puts nothing
        before texts.
        """
        right = self.neighbour(behind)
        for other in before:
            other = other if other != NEWLINE or self.are_prefixed else ""
            left, ids = self.neighbour(other), self.ids(other + text + behind)
            stop = len(ids) - len(right)
            if len(left) <= stop and ids[: len(left)] == left and ids[stop:] == right:
                return ids[len(left) : stop]
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    @cached_property
    def are_prefixed(self) -> bool:
        """Whether the tokenizer puts a space before a text, as SentencePiece does."""
        alone = self.ids(PROBE)
        return self.ids(NEWLINE + PROBE) != self.ids(NEWLINE) + alone and self.decode(alone) == PROBE

    @cached_property
    def added_tokens(self) -> Mapping[str, Any]:
        """The AddedToken of each text that is one."""
        return {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
