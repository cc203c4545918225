"""What a format is, the pair that it reads from a row, and the reading of single cells.

A format is a pure function of a row. It refuses a row that it cannot read (`BadRow`) and leaves out one that
its own rule excludes (`Excluded`). Reasons name columns and keys, never their content: prompts and responses
may be harmful text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from math import inf, isfinite
from typing import Any, Literal

from bdpo.models.template import Message
from bdpo.storage import strict_json

Row = Mapping[str, Any]

_DEEPEST = 100  # no tool and no message is nested so deeply

_MOST_BITS = 10_000  # of a whole number: Python does not write one of more than 4,300 digits

_Number = int | float | Decimal  # columnar files may hold whole numbers as decimals

Group = Literal["safe", "unsafe"]


class BadRow(ValueError):
    """The row cannot be used and is quarantined; the message is a short phrase that names a column."""


class LeftOut(BadRow):
    """A sound row that a length of the config or another data set leaves out: no sign of damaged data.

    It is quarantined as others are, but `data.max_bad_fraction` does not count it.
    """


class Excluded(ValueError):
    """The format's own rule leaves this sound row out; it is counted apart from bad rows."""


@dataclass(frozen=True)
class Pair:
    """A preference pair, whatever file it came from.

    A message holds `role`, `content`, and what else a chat template may write (`tool_calls`,
    `reasoning_content`, ...); `chosen` and `rejected` are messages of the assistant.
    """

    prompt: list[Message]
    chosen: Message
    rejected: Message
    group: Group | None = None  # which kind of query the prompt is
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # of this row alone
    unread: frozenset[str] = frozenset()  # columns, and keys inside columns, of which nothing was taken


@dataclass(frozen=True)
class Format:
    """A preference file format: how its rows are recognised and read.

    `fits` is asked of the first rows when `data.format` is `auto`. `columns` are all that `read` looks at,
    beside the columns that every format has (`bdpo.data.formats.columns`). `expects` describes the
    required columns for a message.
    """

    name: str
    read: Callable[[Row], Pair]
    fits: Callable[[Row], bool]
    columns: tuple[str, ...]
    expects: str


class ReadRow(dict[str, Any]):
    """A row that remembers of which columns a value was taken."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.taken: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.taken.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """The value of a column, as of any mapping."""
        self.taken.add(column)
        return super().get(column, default)

    def untaken(self, columns: Collection[str]) -> set[str]:
        """Those of the columns that hold something and of which no value was taken."""
        rest = (name for name in columns if name not in self.taken)
        return {name for name in rest if not is_empty(dict.get(self, name))}


def answer(text: str) -> Message:
    """A plain message of the assistant."""
    return Message(role="assistant", content=text)


def question(text: str) -> Message:
    """A plain message of the user."""
    return Message(role="user", content=text)


def has_columns(*names: str) -> Callable[[Row], bool]:
    """The `fits` of a format whose columns are enough to recognise it."""
    return lambda row: row.keys() >= set(names)


def cell(row: Row, column: str) -> Any:
    """The value of a required column.

    Raises:
        BadRow: the column is missing or null.
    """
    if column not in row:
        raise BadRow(f"{column}: missing")
    if row[column] is None:
        raise BadRow(f"{column}: null")
    return row[column]


def text_cell(row: Row, column: str) -> str:
    """A required text."""
    return checked_text(cell(row, column), column)


def checked_text(value: object, column: str) -> str:
    """The value if it is a text that UTF-8 can hold."""
    if value is None:
        raise BadRow(f"{column}: null")
    if not isinstance(value, str):
        raise BadRow(f"{column}: wrong type")
    return _utf8(value, column)


def _utf8(text: str, column: str) -> str:
    """The text if UTF-8 can hold it: JSON can escape a lone surrogate, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column}: not UTF-8") from None
    return text


def list_cell(row: Row, column: str) -> list[Any]:
    """A required list."""
    value = cell(row, column)
    if not isinstance(value, list):
        raise BadRow(f"{column}: wrong type")
    return value


def boolean_cell(row: Row, column: str) -> bool:
    """A required label: true or false, or exactly 0 or 1 as some exports write them."""
    value = cell(row, column)
    if not isinstance(value, _Number) or value not in (0, 1):
        raise BadRow(f"{column}: neither true nor false")
    return bool(value)


def id_cell(row: Row, column: str) -> int:
    """A required response id, 0 or 1; a number as 1.0 is exact, true is not an id."""
    value = cell(row, column)
    if isinstance(value, bool) or not isinstance(value, _Number):
        raise BadRow(f"{column}: wrong type")
    if value not in (0, 1):
        raise BadRow(f"{column}: neither 0 nor 1")
    return int(value)


def number_cell(row: Row, column: str) -> float:
    """A required finite number."""
    return checked_number(cell(row, column), column)


def checked_number(value: object, column: str) -> float:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, _Number):
        raise BadRow(f"{column}: not a number")
    try:
        number = float(value)
    except OverflowError:  # of a whole number of more than 308 digits
        number = inf
    if not isfinite(number):
        raise BadRow(f"{column}: not finite")
    return number


def unread_keys(place: str, given: Mapping[str, Any], known: Collection[str]) -> frozenset[str]:
    """The keys of an object that hold something and are not known, each behind its place, for the account."""
    unread = {key for key, value in given.items() if not is_empty(value)} - {*known}
    return frozenset(f"{place}.{key}" for key in unread)


def is_empty(value: Any, depth: int = 0) -> bool:
    """Whether a value is what columnar files and CSV put where a row has nothing; NaN is pandas' null.

    Columnar files give an object that a row does not have all its members, each null.
    """
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return depth < _DEEPEST and all(is_empty(part, depth + 1) for part in value)
    return value is None or value == "" or (not depth and value != value)


def json_value(value: Any, column: str, depth: int = 0) -> Any:
    """The value as JSON holds it, without null members: columnar files give every object the keys of all.

    What only columnar files have, such as times and decimals, becomes its text.

    Raises:
        BadRow: it holds a text that is not UTF-8, bytes, or a number that is not finite or too long, or it is
            nested too deeply to be written.
    """
    if depth > _DEEPEST:
        raise BadRow(f"{column}: nested too deeply")
    if isinstance(value, str):
        return _utf8(value, column)
    if isinstance(value, Mapping):
        present = {str(key): part for key, part in value.items() if part is not None}
        return {_utf8(key, column): json_value(part, column, depth + 1) for key, part in present.items()}
    if isinstance(value, list | tuple):
        return [json_value(part, column, depth + 1) for part in value]
    if isinstance(value, bytes):
        raise BadRow(f"{column}: holds bytes, and only text is read")
    if isinstance(value, float) and not isfinite(value):
        raise BadRow(f"{column}: holds a number that is not finite")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise BadRow(f"{column}: holds a number of too many digits")
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def parsed(text: str, column: str) -> Any:
    """The JSON in a text.

    Raises:
        BadRow: a key stands twice in it.
        ValueError, RecursionError: it is not JSON, or nested too deeply.
    """
    try:
        return strict_json.loads(text)
    except strict_json.RepeatedKey:
        raise BadRow(f"{column}: a key stands twice in its JSON") from None
