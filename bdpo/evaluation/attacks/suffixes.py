"""A suffix inside of a rendered prompt: which ids are its own, and which changes of it are still text.

What an attack finds has to work as text: a suffix counts only if the prompt with its text is tokenised to the
very ids that were optimised, in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bdpo.evaluation.attacks.requests import Request
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class SuffixedPrompt:
    """Ids before and behind the suffix, and of the answer's beginning that is aimed at."""

    request: Request
    before: list[int]
    after: list[int]
    target: list[int]
    texts: tuple[str, str] = field(repr=False)
    """The rendered prompt before and behind the suffix."""

    @classmethod
    def of(cls, chat: ChatTokenizer, request: Request, suffix: str, tokens: int) -> SuffixedPrompt | None:
        """The prompt of a request with a suffix, which begins with a space; None if it is not stable there.

        Of the target are at most `tokens` tokens.
        """
        rendered = chat.template.render([Message(role="user", content=request.goal + suffix)])
        start = rendered.rfind(suffix)
        if start < 0:
            return None
        texts = rendered[:start], rendered[start + len(suffix) :]
        before, after = chat.text_ids(texts[0]), chat.text_ids(texts[1], continues=True)
        target = chat.prefill_ids(request.target)[:tokens]
        prompt = cls(request, before, after, target, texts)
        whole = [*before, *chat.text_ids(suffix, continues=True), *after]
        stable = whole == chat.prompt_ids([Message(role="user", content=request.goal + suffix)])
        return prompt if stable and target else None

    def tokens(self, suffix: Sequence[int]) -> int:
        """The tokens of the prompt and the target."""
        return len(self.before) + len(suffix) + len(self.after) + len(self.target)


def suffix_text(chat: ChatTokenizer, prompt: SuffixedPrompt, suffix: Sequence[int]) -> str:
    """The text of a suffix where it stands: some tokenizers drop a space at the beginning of a text."""
    anchor = prompt.before[-1:]
    return chat.decode([*anchor, *suffix])[len(chat.decode(anchor)) :]


def stable_text(text: str, chat: ChatTokenizer) -> bool:
    """Whether a suffix is one line of printable text, begins with one space, and spells no control token.

    It spells no mark of a thought either, which would become one token. A template may strip a
    message, so no white space stands at its end.
    """
    inside = text[1:]
    plain = text.startswith(" ") and inside == inside.strip() and inside.isprintable() and bool(inside)
    spells = chat.template.holds_control_token(text) or chat.template.holds_thought(text)
    return plain and not spells


def stable_suffixes(
    chat: ChatTokenizer, prompts: Sequence[SuffixedPrompt], suffixes: Sequence[list[int]]
) -> list[list[int]]:
    """Those of the suffixes whose text is tokenised to their own ids in every one of the prompts."""
    texts = [suffix_text(chat, prompts[0], suffix) for suffix in suffixes]
    kept = [n for n, text in enumerate(texts) if stable_text(text, chat)]
    for prompt in prompts:
        found = chat.ids_of_texts([prompt.texts[0] + texts[n] + prompt.texts[1] for n in kept])
        kept = [
            n
            for n, ids in zip(kept, found, strict=True)
            if ids == [*prompt.before, *suffixes[n], *prompt.after]
        ]
    return [suffixes[n] for n in kept]


def candidate_tokens(chat: ChatTokenizer, vocabulary: int) -> torch.Tensor:
    """Which tokens may stand in a suffix, bool, shape (vocabulary,): printable ASCII that is not blank.

    Special and added tokens are none of them, nor embeddings that no token of the tokenizer has.
    """
    tokenizer = chat.tokenizer
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    ids = [i for i in ids if i < vocabulary and i not in set(tokenizer.all_special_ids)]
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[[i for i, text in zip(ids, texts, strict=True) if _is_plain(str(text))]] = True
    return allowed


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and bool(text.strip())
