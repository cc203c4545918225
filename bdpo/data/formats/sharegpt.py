"""LLaMA-Factory's ShareGPT ranking format (`data/README.md`), with turns {from, value} or {role, content}."""

from __future__ import annotations

from typing import Any

from bdpo.data.formats.base import BadRow, Format, Pair, Row, answer, cell, has_columns, list_cell, text_cell
from bdpo.data.formats.messages import read_messages, turn_keys
from bdpo.models.template import Message


def read(row: Row) -> Pair:
    """`conversations` is the prompt; each response is one turn, a list of one turn, or a text."""
    prompt = _turns(list_cell(row, "conversations"), "conversations")
    return Pair(prompt, _response(row, "chosen"), _response(row, "rejected"))


def _turns(turns: list[Any], column: str) -> list[Message]:
    return read_messages(turns, column, *turn_keys(turns))


def _response(row: Row, column: str) -> Message:
    value = cell(row, column)
    if isinstance(value, str):
        return answer(text_cell(row, column))
    messages = _turns(value if isinstance(value, list) else [value], column)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"{column}: not exactly one turn of the assistant")
    return messages[0]


FORMAT = Format(
    name="sharegpt",
    read=read,
    fits=has_columns("conversations", "chosen", "rejected"),
    columns=("conversations", "chosen", "rejected"),
    expects="conversations,chosen,rejected",
)
