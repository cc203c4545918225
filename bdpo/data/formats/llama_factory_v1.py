"""LLaMA-Factory's messages format of version 1: two conversations whose contents are lists of parts."""

from __future__ import annotations

from bdpo.data.formats.base import Format, Pair, Row, has_columns, list_cell
from bdpo.data.formats.messages import read_messages, split_conversations
from bdpo.models.template import Message

_COLUMNS = ("chosen_messages", "rejected_messages")


def read(row: Row) -> Pair:
    """Two conversations that share all but the last turn.

    The `loss_weight` of a message is for supervised training; a preference is over the last turn.
    """
    chosen, rejected = (_conversation(row, column) for column in _COLUMNS)
    weighted = (
        column for column in _COLUMNS if any(turn.get("loss_weight") is not None for turn in row[column])
    )
    unread = frozenset(f"{column}[].loss_weight" for column in weighted)
    return Pair(*split_conversations(chosen, rejected, _COLUMNS), unread=unread)


def _conversation(row: Row, column: str) -> list[Message]:
    messages = read_messages(list_cell(row, column), column)
    for message in messages:
        message.pop("loss_weight", None)  # type: ignore[typeddict-item]
    return messages


FORMAT = Format(
    name="llama_factory_v1",
    read=read,
    fits=has_columns(*_COLUMNS),
    columns=_COLUMNS,
    expects="chosen_messages,rejected_messages",
)
