"""Conversations: turns -> messages, content parts -> text, two conversations -> prompt and answers."""

from __future__ import annotations

from typing import Any

from bdpo.data.formats.base import (
    BadRow,
    Row,
    answer,
    cell,
    checked_text,
    is_empty,
    json_value,
    list_cell,
    parsed,
    question,
    text_cell,
)
from bdpo.models.template import Message

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

# ShareGPT's names, and those of LLaMA-Factory for the turns of tools.
SHAREGPT_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}

# Keys that are a part of what a message means, beside its content.
MEANINGFUL_KEYS = {
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "thoughts",
    "images",
    "image",
    "audio",
    "video",
}

# The keys of a part that is a text; the later ones say nothing of what it means.
_PART_KEYS = {"type", "text", "value", "id", "index", "annotations", "logprobs", "cache_control"}

_NOT_TEXT = {"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file"}


def read_messages(
    turns: list[Any], column: str, role: str = "role", content: str = "content"
) -> list[Message]:
    """Turns with the keys `role` and `content`, or the names given, as messages.

    All other keys of a turn that hold something are kept: the chat template may write them.

    Raises:
        BadRow: a turn is no object, has no role, an unknown role, or content that is not text.
    """
    roles = ROLES if role == "role" else SHAREGPT_ROLES
    return [_message(turn, column, role, content, roles) for turn in turns]


def _message(turn: Any, column: str, role: str, content: str, roles: dict[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{column}: wrong type")
    for key in (role, content):
        if key not in turn and not (key == content and turn.get("tool_calls")):
            raise BadRow(f"{column}: a turn without {key}")
    speaker = checked_text(turn[role], column)
    if speaker not in roles:
        raise BadRow(f"{column}: unknown role")
    others = {
        key: json_value(value, column)
        for key, value in turn.items()
        if key not in (role, content) and not is_empty(value)
    }
    if speaker == "function_call":
        return _call(turn[content], column)
    written = turn.get(content)
    text = "" if written is None and others.get("tool_calls") else content_text(written, column)
    for key in others:
        checked_text(key, column)
    if "tool_calls" in others:
        others["tool_calls"] = _with_objects(others["tool_calls"], column)
    if isinstance(call := others.get("function_call"), dict):
        others["function_call"] = _with_object(call, column)
    return Message(role=roles[speaker], content=text, **others)  # type: ignore[typeddict-item]


def content_text(content: Any, column: str) -> str:
    """The text of a message: a text, or a list of parts that are all texts (OpenAI's content parts).

    Raises:
        BadRow: a part is an image, a sound or a video, or is no part at all.
    """
    if not isinstance(content, list):
        return checked_text(content, column)
    return "".join(_part_text(part, column) for part in content)


def _part_text(part: Any, column: str) -> str:
    if isinstance(part, str):
        return checked_text(part, column)
    if not isinstance(part, dict):
        raise BadRow(f"{column}: wrong type")
    kind = checked_text("text" if part.get("type") is None else part["type"], column)
    if kind in _NOT_TEXT:
        raise BadRow(f"{column}: a content part is not text, and only text is read")
    if kind not in ("text", "input_text", "output_text"):
        raise BadRow(f"{column}: unknown type of content part")
    if any(key not in _PART_KEYS and not is_empty(value) for key, value in part.items()):
        raise BadRow(f"{column}: a content part with a key that is not read")
    return checked_text(part.get("text", part.get("value")), column)  # `value` is LLaMA-Factory's name


def _call(value: Any, column: str) -> Message:
    """ShareGPT's `function_call` turn, JSON of one call or several, as the `tool_calls` of a message."""
    try:
        calls = parsed(checked_text(value, column), column)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [
            {"name": call["name"], "arguments": _object(call["arguments"], column)} for call in calls
        ]
    except BadRow:
        raise
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadRow(f"{column}: a function_call is not JSON with name and arguments") from None
    tool_calls = [{"type": "function", "function": function} for function in functions]
    json_value(tool_calls, column)  # refuses what cannot be written
    return Message(role="assistant", content="", tool_calls=tool_calls)


def _with_objects(calls: Any, column: str) -> Any:
    """Tool calls whose arguments are objects, as chat templates expect; OpenAI's are the JSON of one.

    A template writes a text as it writes an object, as JSON: one that is JSON would be encoded twice.
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return calls  # the template decides what it makes of it
    return [_with_object(call, column) for call in calls]


def _with_object(call: Row, column: str) -> Row:
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _with_object(function, column)}
    return {**call, "arguments": _object(call["arguments"], column)} if "arguments" in call else call


def _object(arguments: Any, column: str) -> Any:
    """The object of which a text is the JSON, with its null members; what is no text is returned as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = parsed(arguments, column)
    except BadRow:
        raise
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadRow(f"{column}: arguments of a tool call that are not JSON of an object")
    json_value(found, column)  # refuses what cannot be written
    return found


def turn_keys(turns: list[Any]) -> tuple[str, str]:
    """How a ShareGPT-like list names role and content: (from, value), or (role, content)."""
    by_role = turns and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return ("role", "content") if by_role else ("from", "value")


def prompt_cell(row: Row, column: str = "prompt") -> list[Message]:
    """A prompt that is a text, or a list of messages."""
    if isinstance(cell(row, column), str):
        return [question(text_cell(row, column))]
    return read_messages(list_cell(row, column), column)


def response_cell(row: Row, column: str) -> Message:
    """A response that is a text, or a list of exactly one message of the assistant."""
    value = cell(row, column)
    if isinstance(value, str):
        return answer(text_cell(row, column))
    messages = read_messages([value] if isinstance(value, dict) else list_cell(row, column), column)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"{column}: not exactly one assistant message")
    return messages[0]


def split_conversations(
    chosen: list[Message], rejected: list[Message], names: tuple[str, str] = ("chosen", "rejected")
) -> tuple[list[Message], Message, Message]:
    """Two conversations that share all but their last turn -> prompt and both responses.

    Raises:
        BadRow: one does not end with an assistant's turn, or they part before the last turn.
    """
    for column, messages in zip(names, (chosen, rejected), strict=True):
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow(f"{column}: does not end with an assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow(f"prompt: differs between {names[0]} and {names[1]}")
    return chosen[:-1], chosen[-1], rejected[-1]
