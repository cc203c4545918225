"""TRL's preference format (`docs/source/dataset_formats.md`): UltraFeedback, Tulu 3 and most others."""

from __future__ import annotations

from bdpo.data.formats.base import BadRow, Format, Pair, Row, list_cell, text_cell
from bdpo.data.formats.messages import (
    prompt_cell,
    read_messages,
    response_cell,
    split_conversations,
)
from bdpo.data.formats.transcript import is_transcript
from bdpo.models.template import Message

_SIDES = ("chosen", "rejected")


def read(row: Row) -> Pair:
    """A pair with an explicit or an implicit prompt.

    Explicit: `prompt` and both responses are each a text or a list of messages; a response is exactly one
    assistant message. Implicit: `chosen` and `rejected` are whole conversations that share all but the last
    turn. As TRL reads it, a `prompt` in plain text beside two conversations repeats a turn of these, and they
    hold the prompt.

    Raises:
        BadRow: a cell is malformed, or such a `prompt` is no turn of the conversations.
    """
    are_conversations = all(_is_conversation(row.get(side)) for side in _SIDES)
    repeats = isinstance(row.get("prompt"), str) and are_conversations
    has_no_prompt = row.get("prompt") is None and are_conversations  # a column that other rows have
    if "prompt" in row and not repeats and not has_no_prompt:
        return Pair(prompt_cell(row), response_cell(row, "chosen"), response_cell(row, "rejected"))
    if isinstance(row.get("chosen"), str):
        raise BadRow("prompt: missing")
    chosen, rejected = (read_messages(list_cell(row, side), side) for side in _SIDES)
    prompt, *answers = split_conversations(chosen, rejected)
    if repeats:
        _require_turn(text_cell(row, "prompt"), prompt)
    return Pair(prompt, answers[0], answers[1])


def _require_turn(text: str, turns: list[Message]) -> None:
    """Make sure that a text, unless it is empty, is one of the turns: dropping it then loses nothing."""
    if text.strip() not in {"", *(turn["content"].strip() for turn in turns)}:
        raise BadRow("prompt: a text that is no turn of the conversations in chosen and rejected")


def _is_conversation(value: object) -> bool:
    """More than an answer: a list of messages that does not begin with the assistant's."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and isinstance(value[0], dict)
        and value[0].get("role") != "assistant"
    )


def _fits(row: Row) -> bool:
    if not {"chosen", "rejected"} <= row.keys():
        return False
    if "prompt" in row:
        return not is_transcript(row["prompt"])
    return "conversations" not in row and isinstance(row["chosen"], list)


FORMAT = Format(
    name="preference",
    read=read,
    fits=_fits,
    columns=("prompt", "chosen", "rejected"),
    expects="prompt,chosen,rejected, or chosen,rejected as conversations",
)
