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


def _named(names: str) -> str:
    """A pattern of the names of speakers, in any case, as `Name:`, `### Name:`, `**Name:**` or `<name>:`."""
    return rf"(?:#{{1,6}} ?|\*\*|<)?(?i:{names})(?:\*\*|>)? ?:"


_USERS = "human|user|you|prompter"
_ASSISTANTS = "assistant|ai assistant|ai|chatbot|bot|chatgpt|gpt"

# The speakers of transcripts that no format reads. Blanks alone part a turn from the next only where both
# names are in capitals, as in Vicuna's template. ChatML without its control tokens has names on lines of
# their own.
_USER = re.compile(rf"\s*(?:{_named('system')}.*?\n)?{_named(_USERS)}", re.DOTALL)
_REPLY = re.compile(rf"\n{_named(_ASSISTANTS)}|\sASSISTANT:")
_BARE_USER = re.compile(r"\s*(?:system\n.*?\n)?user\n", re.DOTALL)
_BARE_REPLY = re.compile(r"\nassistant(?:\n|\Z)")
_INSTRUCTION = re.compile(r"\s*(?:Below is an instruction.*?\n)?#{2,6} ?Instruction:", re.DOTALL)
_RESPONSE = re.compile(r"\n#{2,6} ?Response:")

# A prompt begins so that is a transcript of one turn.
_ONE_TURN = re.compile(r"\r?\n\s*Human:")
_ONE_TURN_OF_ANOTHER_KIND = re.compile(r"\s*(?:### ?Human|GPT4 Correct User):")

_ANSWER_NAME = re.compile(
    rf"\s*(?:GPT4 Correct (?:User|Assistant):|#{{2,6}} ?Response:|{_named(_ASSISTANTS)})"
)

# A prompt ends so that was rendered: with a name on a line of its own, or as a template writes it anywhere.
_ANSWER_HEADER = re.compile(
    rf"(?:\n[ \t]*{_named(_ASSISTANTS)}(?:\*\*)?|(?:ASSISTANT|GPT4 Correct Assistant|#{{2,6}} ?Response"
    r"|#{2,6} ?Assistant):)\s*\Z"
)

# One of these begins a turn wherever it stands in a text.
_USER_WITHIN = re.compile(r"\n\r?\n(?:Human|HUMAN):|\n#{2,6} ?(?:Human|User|Instruction):")

# This one does, too, unless a colon before it introduces an example.
_USER_BEHIND_TEXT = re.compile(rf"\n\r?\n{_named('user|human')}")

# A turn behind the first: a system turn can only be that, and the same word later is text.
_TURN = re.compile(r"\n\n(Human|Assistant):")

_TURN_OF_ONE_LINE_BREAK = re.compile(r"\n(Human|Assistant):")


def is_transcript(text: object) -> bool:
    """Whether a value is a text that begins with a turn of Human: which one of Assistant: follows."""
    human = isinstance(text, str) and _HUMAN.match(text)
    return bool(human and _ASSISTANT.search(human.string, human.end()))


def is_question_of_transcript(text: str) -> bool:
    """Whether a text is the first turn of a transcript that `read_transcript` reads: a line break, Human:."""
    return bool(_ONE_TURN.match(text))


def is_other_transcript(text: str) -> bool:
    """Whether a text begins with turns of User: and Assistant:, You: and Bot:, or the like."""
    for asked, said in ((_USER, _REPLY), (_BARE_USER, _BARE_REPLY), (_INSTRUCTION, _RESPONSE)):
        if (user := asked.match(text)) and said.search(text, user.end()):
            return True
    return bool(_ONE_TURN_OF_ANOTHER_KIND.match(text))


def holds_question(text: str) -> bool:
    """Whether a turn of the user begins somewhere in a text."""
    if _USER_WITHIN.search(text):
        return True
    user = _USER_BEHIND_TEXT.search(text)
    return user is not None and not text[: user.start()].rstrip().endswith(":")


def begins_with_assistant(text: str) -> bool:
    """Whether a text begins with the name of the assistant."""
    return bool(_ANSWER_NAME.match(text))


def ends_with_assistant(text: str) -> bool:
    """Whether a text ends with the header of an answer that would follow."""
    return text.rstrip().endswith((":", ":**")) and bool(_ANSWER_HEADER.search(text))


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
    """Whether a turn of the other speaker seems to begin inside a turn; an answer may quote one.

    An answer that quotes turns of both says so with a colon before them.
    """
    text = turn["content"]
    if turn["role"] == "user":
        return "\nAssistant:" in text
    before, human, behind = text.partition("\nHuman:")
    if "\nAssistant:" in behind and not before.rstrip().endswith(":"):
        return True
    return bool(human) and following is not None and following["role"] == turn["role"]


def _split(turn: re.Pattern[str], text: str) -> list[Message]:
    first = _FIRST.match(text)
    if first is None:
        return []
    parts = [first[1], *turn.split(text[first.end() :])]
    return [
        Message(role=_SPEAKERS[speaker], content=content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
