"""The preference format whose messages are texts: CSV and some exports hold a list as its JSON or repr."""

from __future__ import annotations

import ast
import re
from typing import Any

from bdpo.data.formats import preference
from bdpo.data.formats.base import BadRow, Format, Pair, Row, parsed

_COLUMNS = ("prompt", "chosen", "rejected")

_LIST = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']""")

_MESSAGE = re.compile(r"""\s*\{\s*["'](?:role|content)["']\s*:""")

# JSON of something else may have a key `role`, or a key `content`: a message has both.
_ROLE = re.compile(r"""["']role["']\s*:\s*["'](?:system|developer|user|assistant|tool)["']""")
_CONTENT = re.compile(r"""["']content["']\s*:""")

# Other spellings: another key first, ShareGPT's names, NumPy's arrays, a member of an object, JSON in JSON.
_QUOTE = r"""\\{0,4}["']"""
_MEMBER = rf"\{{\s*{_QUOTE}(?:messages|conversations?){_QUOTE}\s*:\s*"
_OBJECTS = r"(?:(?:\w+\.)?(?:array|list|tuple|deque)\(\s*)?[\[(]\s*\{"
_OBJECT = rf"\{{\s*{_QUOTE}(?:role|content|from|value){_QUOTE}\s*:"
_OTHER_BEGIN = re.compile(rf"""\s*(?:["']\s*)?(?:(?:{_MEMBER})?{_OBJECTS}|{_OBJECT})""")
_OTHER_ROLE = re.compile(
    rf"{_QUOTE}(?:role|from){_QUOTE}\s*:\s*{_QUOTE}"
    rf"(?:system|developer|user|human|assistant|gpt|tool|observation|function_call){_QUOTE}"
)
_OTHER_CONTENT = re.compile(rf"{_QUOTE}(?:content|value){_QUOTE}\s*:")

_LONGEST = 1_000_000  # characters; Python's parser takes memory out of proportion for more


def read(row: Row) -> Pair:
    """A pair as the preference format reads it, after texts that are lists of messages are parsed."""
    return preference.read({**row, **{name: _parsed(row[name], name) for name in _COLUMNS if name in row}})


def is_stringified(text: str) -> bool:
    """Whether a text is a list of messages or one message, written as JSON or as Python writes it."""
    if _MESSAGE.match(text):
        return text.rstrip().endswith("}") and bool(_ROLE.search(text) and _CONTENT.search(text))
    return bool(_LIST.match(text))


def is_stringified_otherwise(text: str) -> bool:
    """Whether a text is a list of messages, or one message, in a spelling that this format does not read."""
    return bool(
        _OTHER_BEGIN.match(text)
        and text.rstrip(" \t\r\n\"'").endswith(("]", "}", ")"))
        and _OTHER_ROLE.search(text)
        and _OTHER_CONTENT.search(text)
    )


def _parsed(value: Any, column: str) -> Any:
    if not isinstance(value, str) or not is_stringified(value):
        return value
    if len(value) > _LONGEST:
        raise BadRow(f"{column}: a list of messages of more than {_LONGEST} characters")
    for parse in (lambda text: parsed(text, column), ast.literal_eval):
        try:
            found = parse(value.strip())
            return [found] if isinstance(found, dict) else found
        except BadRow:
            raise
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise BadRow(f"{column}: neither JSON nor a Python list of messages")


FORMAT = Format(
    name="stringified",
    read=read,
    fits=lambda row: False,  # set explicitly, where a row of the preference format was refused
    columns=_COLUMNS,
    expects="prompt,chosen,rejected, each as the text of a list of messages, or of one",
)
