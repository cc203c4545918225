"""The sources of raw rows: a file, a folder or a hub name for `datasets`; local, or on object storage.

A file or folder on object storage is read from its local copy. JSON Lines, Parquet and `datasets` are
streamed; JSON and CSV are read into memory.
"""

from __future__ import annotations

import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from bdpo.config.data import DataConfig, SourceConfig
from bdpo.data.containers import (
    NumberedRow,
    RawRow,
    Read,
    Unreadable,
    kind_of,
    read_file,
    shown_name,
)
from bdpo.data.data_file import DataFile
from bdpo.data.folders import columns_of_folders, data_files, read_datasets, refuse_parts
from bdpo.data.formats import KNOWN_COLUMNS, columns_of, detect, format_named
from bdpo.data.formats.base import Format
from bdpo.errors import UserError, error_line, escaped, first_line
from bdpo.storage.cache import cached_copy
from bdpo.storage.digests import files_digest
from bdpo.storage.manifests import Fingerprint

DETECT_ROWS = 100

# What the readers raise for a damaged file; UnicodeDecodeError is of the name of a column in Parquet.
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException, UnicodeDecodeError)

_MOST_NAMES = 20  # of columns, in a message


@dataclass(frozen=True)
class Source:
    """An opened data set: its format, its numbered rows, and the reader that they come from."""

    config: SourceConfig
    format: Format
    rows: Iterator[NumberedRow]
    reader: Reader


def open_source(config: SourceConfig) -> Source:
    """Open a data set and find its format by the first rows, unless it is configured.

    A row is `Unreadable` where it alone is damaged. Columns have the names of the format.

    Raises:
        UserError: the source is missing, empty, of an unknown kind or format, or cannot be read at all.
            While the rows are read: a later part of it is damaged.
    """
    configured = None if config.format == "auto" else format_named(config.format)
    if not config.path.strip():
        raise UserError("data.path: is empty; it names a file, a folder or a data set on the hub")
    for name in config.columns.keys() - KNOWN_COLUMNS:
        raise UserError(f"data.columns.{escaped(name)}: no format reads a column of this name")
    reader = Reader(config, columns_of(configured) if configured else KNOWN_COLUMNS)
    rows = islice(reader, config.limit and min(config.limit, sys.maxsize))
    head = list(islice(rows, DETECT_ROWS))
    seen = [(number, row) for number, found in head if (row := _seen(config, found)) is not None]
    readable = any(not isinstance(row, Unreadable) for _, row in head)
    if not readable and (configured or not seen):
        reason = head[0][1].reason if isinstance(head[0][1], Unreadable) else ""
        raise UserError(f"{_name(config)}: no row can be read ({reader.place(head[0][0])}: {reason})")
    for name, column in config.columns.items():
        if not any(name in row for _, row in seen):
            own = {f"{one} (in the file)": one for one in config.columns} | config.columns
            there = sorted(own.get(one, one) for one in reader.schema())
            others = f", only {', '.join(map(shown_name, there))}" if there else ""
            raise UserError(
                f"data.columns.{name}={escaped(column)}: {_name(config)} has no such column{others}"
            )
    form = configured or _detected(config, reader, seen)
    if configured is None and reader.is_columnar():  # a column of another format may spoil rows of this one
        return replace(open_source(config.model_copy(update={"format": form.name})), config=config)
    return Source(config, form, chain(head, rows), reader)


def _seen(config: SourceConfig, row: RawRow | Unreadable) -> RawRow | None:
    """The columns of a row by which its format is found; also of one with a value that cannot be read."""
    if not isinstance(row, Unreadable):
        return row
    return _renaming(config)(row.raw) if isinstance(row.raw, dict) else None


def _detected(config: SourceConfig, reader: Reader, rows: list[tuple[int, RawRow]]) -> Format:
    """The one format of the first rows, in whichever files of a folder they are."""
    by_file: dict[str, list[RawRow]] = {}
    for number, row in rows:
        by_file.setdefault(reader.locate(number)[0], []).append(row)
    found = {
        file: detect(rows, f"{_name(config)}{file and ', '}{file}", reader.schema())
        for file, rows in by_file.items()
    }
    (first, form), *others = found.items()
    for file, other in others:
        if other is not form:
            raise UserError(
                f"{_name(config)}: {first} is {form.name}, {file} is {other.name}; name the files in a list, "
                "or set data.format to read all of them alike"
            )
    return form


def count_rows(config: DataConfig) -> int:
    """How many rows the data sets have, counted by reading them."""
    return sum(1 for source in config.sources() for _ in open_source(source).rows)


class Reader:
    """Iterates over the rows of a data set, with the columns renamed, and remembers where they stand.

    Rows are numbered through all files of a folder. `declared` are the columns that the files read so far
    declare for all of their rows, `beside_rows` keys of their JSON that hold no rows; `unread_files` are data
    files of a folder that belong to no split. Of columnar files `columns` are read, by their names in the
    format.
    """

    def __init__(self, config: SourceConfig, columns: frozenset[str]) -> None:
        self.config = config
        self.columns = frozenset(
            {config.columns.get(name, name) for name in columns} | {*config.columns.values()}
        )
        self.declared: set[str] = set()
        self.beside_rows: set[str] = set()
        self.unread_files: list[str] = []
        self._begun: list[tuple[int, str]] = []  # (the number of rows before a file, its name in the folder)

    def _kind(self) -> str | None:
        """The kind of the last file; None for what `datasets` reads."""
        name = self._begun[-1][1] if self._begun else ""
        return kind_of(Path(name or self.config.path))

    def is_columnar(self) -> bool:
        """Whether the columns that are read were chosen."""
        return self._kind() in (None, ".parquet")

    def schema(self) -> list[str]:
        """The declared columns for a message, none of CSV: its first line may be a row of texts."""
        names = [] if self._kind() == ".csv" else sorted(map(shown_name, self.declared))
        return [*names[:_MOST_NAMES], *([f"{len(names) - _MOST_NAMES} others"] * (len(names) > _MOST_NAMES))]

    def locate(self, number: int) -> tuple[str, int]:
        """The file in which a row stands, "" if the data are no folder, and the number of the row in it."""
        before, file = next(begun for begun in reversed(self._begun) if begun[0] < number)
        return file, number - before

    def place(self, number: int) -> str:
        """The same for a message."""
        file, row = self.locate(number)
        return f"row {row} of {file}" if file else f"row {row}"

    def __iter__(self) -> Iterator[NumberedRow]:
        number = 0
        try:
            for file, read in self._files(local_source(self.config)):
                self._begun.append((before := number, file))
                rows, declared, beside = read()
                of_folders = columns_of_folders(file)
                named = dict.fromkeys([*of_folders, *declared], "")
                self.declared |= _renaming(self.config)(named).keys()
                self.beside_rows |= set(beside)
                change = _change(self.config, file, of_folders)
                for row_number, row in rows:
                    number = before + row_number
                    yield number, row if isinstance(row, Unreadable) or change is None else change(row)
        except _UNREADABLE as error:
            before, file = self._begun[-1] if self._begun else (0, "")
            place = f"row {number - before}" + (f" of {file}" if file else "")
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{_name(self.config)}: cannot be read after {place} ({reason})") from None
        if not number:
            raise UserError(f"{_name(self.config)}: is empty, there are no rows")

    def _files(self, path: Path) -> Iterator[tuple[str, Callable[[], Read]]]:
        """What is to be read in turn: the files of a folder with their names, else one without a name."""
        config, name, columns = self.config, _name(self.config), self.columns
        try:
            is_file, exists = path.is_file(), path.exists()
        except ValueError as error:  # a NUL in the name
            raise UserError(f"{name}: {first_line(error)}") from None
        if exists and not is_file and not path.is_dir():
            raise UserError(f"{name}: is neither a file nor a folder")
        if not exists and (kind_of(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path)):
            raise UserError(f"{name}: no such file or folder")
        if is_file:
            refuse_parts(config, name, "a file")
            yield "", partial(read_file, DataFile(path, f"data.path={escaped(str(path))}", columns))
        elif path.is_dir() and (found := data_files(path, config, name)):
            root = path.resolve()
            self.unread_files = [shown_name(file.relative_to(root)) for file in found.others]
            for file in found.files:
                opened = DataFile(file, f"data.path={escaped(str(file))}", columns)
                yield escaped(str(file.relative_to(root))), partial(read_file, opened)
        else:
            yield "", partial(read_datasets, path, config, name, columns)


def _name(config: SourceConfig) -> str:
    return f"data.path={escaped(config.path)}"


def local_source(config: SourceConfig) -> Path:
    """The data set on this machine: a URL's cached copy; a hub name stays what it is.

    Raises:
        UserError: nothing can be read at the URL.
    """
    return cached_copy(config.path, "data.path") if "://" in config.path else Path(config.path)


def sources_fingerprint(sources: list[SourceConfig]) -> Fingerprint:
    """What the rows of some data sets depend on: their content, and how it is read.

    Of a data set on the hub only the name is known before it is loaded.

    Raises:
        UserError: a file cannot be read.
    """
    described = [_fingerprint(source) for source in sources]
    return described[0] if len(described) == 1 else {"data.path": described}


def _fingerprint(source: SourceConfig) -> Fingerprint:
    path = local_source(source)
    try:
        if path.is_dir():
            content = files_digest(sorted(path.rglob("*.*")), path)
        else:
            content = files_digest([path]) if path.is_file() else str(path)
    except OSError as error:
        raise UserError(f"{_name(source)}: cannot be read ({error_line(error)})") from None
    keys = source.model_dump(exclude={"path"})
    return {"data.path": content, **{f"data.{name}": value for name, value in keys.items()}}


def _change(config: SourceConfig, file: str, of_folders: dict[str, str]) -> Callable[[RawRow], RawRow] | None:
    """What is done to every row of a file before its format reads it; None for nothing.

    It gets the columns that its folders name unless it has them, and columns are renamed. The values of CSV
    and of names are texts.
    """
    steps: list[Callable[[RawRow], RawRow]] = []
    if of_folders:
        steps.append(lambda row: of_folders | row)
    if config.columns:
        steps.append(_renaming(config))
    if of_folders or kind_of(Path(file or config.path)) == ".csv":
        steps.append(_typed)
    return (lambda row: reduce(lambda changed, step: step(changed), steps, row)) if steps else None


def _renaming(config: SourceConfig) -> Callable[[RawRow], RawRow]:
    """Rows with the columns of `data.columns` under the names of the format.

    A column that already has such a name makes way for the one that is configured.
    """
    names = config.columns
    taken = set(names.values())

    def rename(row: RawRow) -> RawRow:
        found = {name: row[column] for name, column in names.items() if column in row}
        others = {
            f"{column} (in the file)" if column in names else column: value
            for column, value in row.items()
            if column not in taken
        }
        return others | found

    return rename


_BOOLEAN = {"": None, "true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}

_ID = {"": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1}

_CSV_TYPES: dict[str, dict[str, Any]] = {
    "group": {"": None},
    "better_response_id": _ID,
    "chosen_safe": _BOOLEAN,
    "rejected_safe": _BOOLEAN,
    "is_response_0_safe": _BOOLEAN,
    "is_response_1_safe": _BOOLEAN,
}

_CSV_NUMBERS = ("overall_preference", "preference_strength")


def _typed(row: RawRow) -> RawRow:
    """The row with the texts of typed columns read; one that cannot be stays a text."""
    texts = {column: value for column, value in row.items() if isinstance(value, str)}
    typed = {
        column: _CSV_TYPES[column].get(texts[column].strip().lower(), texts[column])
        for column in texts.keys() & _CSV_TYPES.keys()
    }
    for column in _CSV_NUMBERS:
        if column in texts and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", texts[column]):
            typed[column] = float(texts[column])
    return row | typed
