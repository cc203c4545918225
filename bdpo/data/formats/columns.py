"""The columns that mean the same in every format: system prompt, tools, template arguments, labels, media."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bdpo.data.formats.base import (
    BadRow,
    Group,
    Pair,
    Row,
    boolean_cell,
    checked_text,
    is_empty,
    json_value,
    parsed,
)
from bdpo.models.template import Message

SYSTEM = ("system", "system_prompt")

TOOLS = ("tools", "functions")

TEMPLATE_KWARGS = "chat_template_kwargs"  # TRL's name

MEDIA = ("images", "image", "videos", "video", "audios", "audio")

LABELS = ("chosen_safe", "rejected_safe")

COMMON_COLUMNS = (*SYSTEM, *TOOLS, TEMPLATE_KWARGS, *MEDIA, "group", *LABELS)


def with_common_columns(pair: Pair, row: Row) -> Pair:
    """The pair with the values of the columns that every format has.

    Raises:
        BadRow: one of them is malformed, contradicts the conversation, or holds media.
    """
    if row.keys().isdisjoint(COMMON_COLUMNS):  # most rows: the common case costs one look
        return pair
    row = {name: value for name, value in row.items() if value == value}  # NaN is the null of pandas
    refuse_media(row)
    changes: dict[str, Any] = {"prompt": _with_system(pair.prompt, row)}
    if tools := _tools(row):
        if pair.tools and pair.tools != tools:
            raise BadRow("tools: two different lists")
        changes["tools"] = tools
    if kwargs := _json_cell(row, TEMPLATE_KWARGS, dict):
        changes["template_kwargs"] = kwargs
    if row.get("group") is not None:
        changes["group"] = _group(row)
    for column in LABELS:
        if row.get(column) is not None:
            changes[column] = boolean_cell(row, column)
    return replace(pair, **changes)


def refuse_media(given: Row, place: str = "") -> None:
    """Make sure that a row, or an object in it whose `place` is named, holds no images, videos or sounds."""
    for key in MEDIA:
        if not is_empty(given.get(key)):
            raise BadRow(f"{place}{key}: not empty, and only text is read")


def _with_system(prompt: list[Message], row: Row) -> list[Message]:
    for column in SYSTEM:
        if row.get(column):
            text = checked_text(row[column], column)
            if prompt and prompt[0]["role"] == "system":
                if prompt[0]["content"] != text:
                    raise BadRow(f"{column}: the conversation begins with another system turn")
            else:
                prompt = [Message(role="system", content=text), *prompt]
    return prompt


def _tools(row: Row) -> list[Any] | None:
    found = [tools for column in TOOLS if (tools := _json_cell(row, column, list))]
    if len(found) > 1 and found[0] != found[1]:
        raise BadRow("tools: tools and functions are two different lists")
    return found[0] if found else None


def _json_cell(row: Row, column: str, kind: type) -> Any:
    """A list or an object, or its JSON: columnar files hold nested values of changing shape as texts."""
    value = row.get(column)
    if not value:
        return None
    if isinstance(value, str):
        try:
            value = parsed(checked_text(value, column), column)
        except BadRow:
            raise
        except (ValueError, RecursionError):
            raise BadRow(f"{column}: neither a {kind.__name__} nor JSON of one") from None
        if value is None:  # the JSON of nothing
            return None
    if not isinstance(value, kind):
        raise BadRow(f"{column}: wrong type")
    return json_value(value, column)


def _group(row: Row) -> Group:
    value = row["group"]
    if value not in ("safe", "unsafe"):
        raise BadRow("group: neither safe, unsafe nor null")
    return value
