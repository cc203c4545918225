"""JSON from elsewhere in which no key stands twice: of two values readers take either, without a word."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKey(ValueError):
    """A key stands twice in an object; `key` is its name, which may be text of the data."""

    def __init__(self, key: str) -> None:
        super().__init__("a key stands twice")
        self.key = key


def loads(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does.

    Raises:
        RepeatedKey: a key stands twice in an object.
        ValueError, RecursionError: the text is not JSON, or nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(members)
    if len(values) < len(members):
        seen = set[str]()
        for name, _ in members:
            if name in seen:
                raise RepeatedKey(name)
            seen.add(name)
    return values


def is_unicode(text: str) -> bool:
    """Whether a text is without halves of surrogate pairs, which JSON can spell and no file can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
