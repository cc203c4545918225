"""Instructions in plain text: LLaMA-Factory's Alpaca ranking format, exports of Argilla and distilabel."""

from __future__ import annotations

from bdpo.data.formats.base import (
    BadRow,
    Format,
    Pair,
    Row,
    answer,
    checked_text,
    is_empty,
    list_cell,
    question,
    text_cell,
)
from bdpo.models.template import Message

INSTRUCTION_COLUMNS = ("instruction", "question", "input")

_RESPONSES = {"chosen": ("chosen", "chosen_response"), "rejected": ("rejected", "rejected_response")}


def read(row: Row) -> Pair:
    """`instruction` (or `question`), followed by `input` on a line of its own; `history` comes before it.

    Without an instruction `input` is the prompt. The responses are `chosen` and `rejected`, or
    `chosen_response` and `rejected_response`. Columns with the same text are written once.
    """
    return Pair(instruction_prompt(row), _response(row, "chosen"), _response(row, "rejected"))


def instruction_prompt(row: Row) -> list[Message]:
    """The turns of `history`, and one of the user.

    Raises:
        BadRow: a column is malformed, or there is neither an instruction nor an input.
    """
    columns = (column for column in INSTRUCTION_COLUMNS if not is_empty(row.get(column)))
    parts = dict.fromkeys(text for column in columns if (text := text_cell(row, column)).strip())
    if not parts:
        raise BadRow("instruction: missing")
    return [*_history(row), question("\n".join(parts))]


def _response(row: Row, side: str) -> Message:
    column = next((name for name in _RESPONSES[side] if row.get(name) is not None), side)
    return answer(text_cell(row, column))


def _history(row: Row) -> list[Message]:
    """Pairs of instruction and answer."""
    if not row.get("history"):
        return []
    messages = []
    for turn in list_cell(row, "history"):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("history: not a list of pairs of instruction and answer")
        asked, said = (checked_text(text, "history") for text in turn)
        messages += [question(asked), answer(said)]
    return messages


def _fits(row: Row) -> bool:
    asks = not row.keys().isdisjoint(INSTRUCTION_COLUMNS) and "prompt" not in row
    return asks and all(
        any(isinstance(row.get(column), str) for column in columns) for columns in _RESPONSES.values()
    )


FORMAT = Format(
    name="instruction",
    read=read,
    fits=_fits,
    columns=(*INSTRUCTION_COLUMNS, "history", *_RESPONSES["chosen"], *_RESPONSES["rejected"]),
    expects="instruction,chosen,rejected or instruction,chosen_response,rejected_response as texts",
)
