"""An answer and the thoughts that a model wrote around it.

Families mark a thought block in their own ways, many by special tokens, which a decoded text would lose. So
an answer is decoded with the marks of its tokenizer, and these become one pair, `<think>` and `</think>`: all
that stores, shows or judges an answer finds its thoughts by that pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from bdpo.models.template import THOUGHT_MARK
from bdpo.storage.digests import json_digest

if TYPE_CHECKING:
    from bdpo.models.tokenizer import ChatTokenizer

OPENING, CLOSING = "<think>", "</think>"
"""The marks of DeepSeek-R1, Qwen3 and SmolLM3, which stand for those of all families."""

_TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "scratchpad", "seed:think")

_TAG = re.compile(rf"<(/?)(?:{'|'.join(_TAGS)})\s*>", re.IGNORECASE)
"""A tag of thoughts (`seed:think` is Seed-OSS's), in any case: models that were only told to use tags write
`<Think>`, too."""

_KNOWN = (
    *((f"<{tag}>", f"</{tag}>") for tag in _TAGS),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>", "<channel|>"),  # Gemma 4, whose one channel is that of its thoughts
)
"""Marks that are understood in every text, also where its tokenizer is not at hand."""

_ENDS = (
    (r"^([<\[◁]\|?)", r"\1/"),
    (r"begin", "end"),
    (r"BEGIN", "END"),
    (r"start", "end"),
    (r"START", "END"),
)
"""How the mark that closes a block is made of the one that opens it."""

_CHANNELS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
"""gpt-oss writes messages, each in a channel, of which only `final` is the answer (the Harmony format)."""

_MESSAGE = re.compile(
    r"(?:<\|start\|>[^<]*)?<\|channel\|>\s*(?P<channel>\w*)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"(?P<text>.*?)(?P<end><\|(?:end|call|return)\|>|(?=<\|start\|>|<\|channel\|>)|\Z)",
    re.DOTALL,
)

_ENDS_LINE = re.compile(r"[ \t]*(?:\n|\Z)")

_JOINED = re.compile(r"[\w.!?…。！？]")
"""What has a mark beside it without a blank; a mark that is a word of the text has a blank or a quote."""

_QUOTES = ("`", "'", '"')

_SENTENCE_ENDS = (".", "!", "?", ":", "…", "。", "！", "？")

_MARK_TOKENS = 32
"""More than any mark that opens a thought block takes."""


RULES = json_digest([2, [list(pair) for pair in _KNOWN]])
"""Of what is cut off: another one where the rules change, so that verdicts by two of them are not mixed."""


class Marks(NamedTuple):
    """How the model of a tokenizer marks its thoughts."""

    pairs: tuple[tuple[str, str], ...]
    skipped: frozenset[int]
    """Special tokens that are no part of a text, the marks left out."""


@lru_cache(maxsize=8)
def marks_of(chat: ChatTokenizer) -> Marks:
    """The marks that template and added tokens of a tokenizer have, beside those that are always understood.

    A word of thinking in brackets is a mark where the one that closes it is there as well.
    """
    added = chat.tokenizer.added_tokens_decoder
    texts = {token.content for token in added.values()}
    found = {
        *THOUGHT_MARK.findall(chat.tokenizer.get_chat_template()),
        *filter(THOUGHT_MARK.fullmatch, texts),
    }
    pairs = tuple(sorted((opening, end) for opening in found for end in _closings(opening) if end in found))
    kept = {mark for pair in (*pairs, *_KNOWN, (OPENING, CLOSING)) for mark in pair}
    kept |= set(_CHANNELS) if "<|channel|>" in texts else set()
    special = {*chat.tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
    return Marks(pairs, frozenset(id for id in special if added[id].content not in kept))


def _closings(opening: str) -> Iterator[str]:
    for pattern, replacement in _ENDS:
        closing = re.sub(pattern, replacement, opening, count=1)
        if closing != opening:
            yield closing


def decode_answer(chat: ChatTokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids without special tokens; thoughts stand between `<think>` and `</think>`."""
    marks = marks_of(chat)
    return marked(chat.decode([i for i in ids if i not in marks.skipped]), marks.pairs)


def opened_by(chat: ChatTokenizer, prompt_ids: Sequence[int]) -> str:
    """`<think>` where a prompt ends with the mark of a thought block, so that the answer begins inside of it;
    else empty. Some templates (DeepSeek-R1) write the mark themselves."""
    end = marked(chat.decode(prompt_ids[-_MARK_TOKENS:]), marks_of(chat).pairs)
    return OPENING if end.rstrip().endswith(OPENING) else ""


def marked(text: str, pairs: Iterable[tuple[str, str]] = ()) -> str:
    """The text with `<think>` and `</think>` in place of all other marks, known ones and `pairs`."""
    text = _TAG.sub(r"<\1think>", text)
    for opening, closing in (*_KNOWN, *pairs):
        text = text.replace(opening, OPENING).replace(closing, CLOSING)
    return _without_channels(text) if "<|channel|>" in text else text


def _without_channels(text: str) -> str:
    """A text in channels: every other one than `final` is a thought, which ends where a final one follows."""
    found = list(_MESSAGE.finditer(text))
    before = text[: found[0].start()] if found else text
    answered = any(message["channel"] == "final" for message in found)
    written = "".join(
        message["text"] if message["channel"] == "final" else f"{OPENING}{message['text']}{CLOSING}"
        for message in found
    )
    # What ends before the first channel is of the channel that the prompt opened.
    return before.replace("<|end|>", CLOSING) + (written if answered else written.removesuffix(CLOSING))


def without_thoughts(response: str) -> str | None:
    """The answer outside of the thought blocks; None where it is all thought and the last block never ends.

    What stands behind a block is the answer, whatever marks it has: so a user sees it. A mark that closes a
    block which nothing opened ends the thoughts that the text begins with, unless nothing stands behind it or
    it is a word of a sentence: else the mark begins or ends a line, or joins what is beside it. An opening
    mark that nothing closes is a word of the answer where it does not begin a line or follow the end of a
    sentence.
    """
    text = marked(response)
    unmarked = text if "<|channel|>" in response else response
    parts = text.split(CLOSING)
    last = max((number for number, part in enumerate(parts) if part.strip()), default=0)
    if last and OPENING not in parts[0] and _ends_thoughts(parts[0], parts[1]):
        parts[0] = OPENING + parts[0]
    kept, number, in_blocks = "", 0, False
    while number < len(parts) - 1:
        before, opened, _ = parts[number].partition(OPENING)
        kept += before if opened else before + CLOSING
        number = 1 + (_end_of_block(parts, number, last) if opened else number)
        in_blocks = in_blocks or bool(opened)
    before, opened, behind = parts[-1].partition(OPENING)
    if opened and not (kept + before).strip():
        return None
    if not opened or not _begins_thoughts(before, behind):
        return (kept + parts[-1]).strip() if in_blocks else unmarked
    return (kept + before).strip()


def _end_of_block(parts: Sequence[str], first: int, last: int) -> int:
    """The part that ends with the mark which closes the block that is opened in part `first`; `last` is the
    last part that is not blank.

    A mark in quotes closes nothing. A block within the block, as of a model that writes down how it will
    answer, ends before it; but not where nothing would be left as the answer.
    """
    depth, end = 0, first
    for number in range(first, len(parts) - 1):
        depth += parts[number].count(OPENING)
        if parts[number][-1:] in _QUOTES and parts[number][-1:] == parts[number + 1][:1]:
            continue
        if number == first or number < last:
            end = number
        depth -= 1
        if depth == 0:
            break
    return end


def _begins_thoughts(before: str, behind: str) -> bool:
    begins_line = not before.rpartition("\n")[2].strip()
    return begins_line or bool(before.rstrip().endswith(_SENTENCE_ENDS) and re.match(r"\w", behind))


def _ends_thoughts(before: str, rest: str) -> bool:
    begins_line = not before.rpartition("\n")[2].strip()
    joined = _JOINED.match(before[-1:]) or re.match(r"\w", rest)
    return begins_line or bool(joined or _ENDS_LINE.match(rest))
