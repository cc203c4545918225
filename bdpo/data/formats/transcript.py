"""Transcripts of `Human:` and `Assistant:` turns in one text, as HH-RLHF and Nectar have them."""

from __future__ import annotations

import re

from bdpo.data.formats.base import BadRow, Row, text_cell
from bdpo.models.template import Message

_SPEAKERS = {"System": "system", "Human": "user", "Assistant": "assistant"}

_FIRST = re.compile(r"\s*(System|Human|Assistant):")

# A first turn, and the reply to search for behind it: one pattern of both takes time that grows with the
# square of a long text.
_HUMAN = re.compile(r"\s*(?:System:.*?\s)?Human:", re.DOTALL)
_ASSISTANT = re.compile(r"\sAssistant:")

# The names of speakers in transcripts that no format reads. Blanks alone part a turn from the next only where
# both names are in capitals, as in Vicuna's template.
_USER = re.compile(r"\s*(?:(?:System|SYSTEM):.*?\n)?(?:Human|HUMAN|User|USER):", re.DOTALL)
_REPLY = re.compile(r"\n(?:Assistant|Bot|BOT):|\sASSISTANT:")

# A blank line and one of these names begin a turn wherever they stand in a text.
_USER_WITHIN = re.compile(r"\n\r?\n(?:Human|HUMAN):")

# A system turn can only be the first; the same word later is text.
_TURN = re.compile(r"(?:\A\s*(System|Human|Assistant)|\n\n(Human|Assistant)):")

_TURN_OF_ONE_LINE_BREAK = re.compile(r"(?:\A\s*(System|Human|Assistant)|\n(Human|Assistant)):")


def is_transcript(text: object) -> bool:
    """Whether a value is a text that begins with a turn of Human: which one of Assistant: follows."""
    human = isinstance(text, str) and _HUMAN.match(text)
    return bool(human and _ASSISTANT.search(human.string, human.end()))


def is_other_transcript(text: str) -> bool:
    """Whether a text begins with turns of User: and Assistant:, User: and Bot:, or the like."""
    user = _USER.match(text)
    return bool(user and _REPLY.search(text, user.end()))


def holds_question(text: str) -> bool:
    """Whether a turn of Human: begins somewhere in a text, after a blank line."""
    return bool(_USER_WITHIN.search(text))


def begins_with_speaker(text: object) -> bool:
    """Whether a value is a text that begins with the name of a speaker."""
    return isinstance(text, str) and bool(_FIRST.match(text))


def read_transcript(row: Row, column: str) -> list[Message]:
    """The turns of a transcript, which a blank line parts, or a line break where no blank line does.

    Raises:
        BadRow: the text does not begin with the name of a speaker, or parts its turns in both ways.
    """
    text = text_cell(row, column)
    turns = _split(_TURN, text)
    if len(turns) == 1 or (len(turns) == 2 and turns[0]["role"] == "system"):
        turns = _split(_TURN_OF_ONE_LINE_BREAK, text)
    if not turns:
        raise BadRow(f"{column}: not a transcript of Human: and Assistant:")
    if any(_holds_other_turn(*pair) for pair in zip(turns, [*turns[1:], None], strict=True)):
        raise BadRow(f"{column}: some turns are parted by a blank line, others by a line break alone")
    return turns


def _holds_other_turn(turn: Message, following: Message | None) -> bool:
    """Whether a turn of the other speaker seems to begin inside a turn; an answer may quote one."""
    if turn["role"] == "user":
        return "\nAssistant:" in turn["content"]
    return following is not None and following["role"] == turn["role"] and "\nHuman:" in turn["content"]


def _split(turn: re.Pattern[str], text: str) -> list[Message]:
    before, *parts = turn.split(text)
    if before.strip():
        return []
    speakers = (first or later for first, later in zip(parts[::3], parts[1::3], strict=True))
    return [
        Message(role=_SPEAKERS[speaker], content=content.strip())
        for speaker, content in zip(speakers, parts[2::3], strict=True)
    ]
