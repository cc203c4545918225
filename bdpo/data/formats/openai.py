"""OpenAI's format for preference fine-tuning: `input`, `preferred_output`, `non_preferred_output`."""

from __future__ import annotations

from bdpo.data.formats.base import BadRow, Format, Pair, Row, cell, has_columns, unread_keys
from bdpo.data.formats.columns import COMMON_COLUMNS, with_common_columns
from bdpo.data.formats.messages import read_messages, response_cell


def read(row: Row) -> Pair:
    """`input.messages` is the prompt; each output is one assistant message.

    What every format reads as a column (system prompt, tools, media, ...) may stand in `input`, too.
    """
    given = cell(row, "input")
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise BadRow("input: not an object with a list of messages")
    pair = Pair(
        read_messages(given["messages"], "input"),
        response_cell(row, "preferred_output"),
        response_cell(row, "non_preferred_output"),
        unread=unread_keys("input", given, {"messages", *COMMON_COLUMNS}),
    )
    try:
        return with_common_columns(pair, given)
    except BadRow as reason:
        raise BadRow(f"input.{reason}") from None


FORMAT = Format(
    name="openai",
    read=read,
    fits=has_columns("input", "preferred_output", "non_preferred_output"),
    columns=("input", "preferred_output", "non_preferred_output"),
    expects="input,preferred_output,non_preferred_output",
)
