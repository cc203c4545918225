"""OpenAI's format for preference fine-tuning: `input`, `preferred_output`, `non_preferred_output`."""

from __future__ import annotations

from bdpo.data.formats.base import BadRow, Format, Pair, Row, cell, has_columns, without_nulls
from bdpo.data.formats.messages import read_messages, response_cell


def read(row: Row) -> Pair:
    """`input.messages` is the prompt, `input.tools` are its tools; each output is one assistant message."""
    given = cell(row, "input")
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise BadRow("input: not an object with a list of messages")
    tools = without_nulls(given.get("tools")) or None
    if tools is not None and not isinstance(tools, list):
        raise BadRow("input: tools are no list")
    return Pair(
        read_messages(given["messages"], "input"),
        response_cell(row, "preferred_output"),
        response_cell(row, "non_preferred_output"),
        tools=tools,
    )


FORMAT = Format(
    name="openai",
    read=read,
    fits=has_columns("input", "preferred_output", "non_preferred_output"),
    columns=("input", "preferred_output", "non_preferred_output"),
    expects="input,preferred_output,non_preferred_output",
)
