"""Arguments of tool calls, as an object or as its JSON: chat templates expect the one or the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PROBE_ARGUMENTS = {"bdpoprobe": "x"}

PROBE_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "bdpoprobe", "type": "function", "function": {"name": "f", "arguments": PROBE_ARGUMENTS}}
    ],
}


def with_text_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose tool calls have their arguments as JSON."""
    calls = message.get("tool_calls")
    texts = {"tool_calls": [_as_text(call) for call in calls]} if isinstance(calls, list) else {}
    return {**message, **texts}


def _as_text(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _as_text(function)}
    if isinstance(arguments := call.get("arguments"), dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call
