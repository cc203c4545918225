"""Where raw rows come from: a file, a folder or a hub name for `datasets`; here, or on object storage.

A file or folder on object storage is read from its local copy. JSON Lines, Parquet and `datasets` are
streamed; JSON and CSV are read into memory.
"""

from __future__ import annotations

import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from bdpo.config.data import DataConfig, SourceConfig
from bdpo.data.containers import (
    ARROW_ROWS,
    DataFile,
    NumberedRow,
    RawRow,
    Read,
    Unreadable,
    arrow_rows,
    kind_of,
    read_file,
)
from bdpo.data.formats import KNOWN_COLUMNS, detect, format_named
from bdpo.data.formats.base import Format
from bdpo.errors import UserError, error_line, first_line, printable
from bdpo.storage.cache import cached_copy
from bdpo.storage.digests import files_digest
from bdpo.storage.manifests import Fingerprint

DETECT_ROWS = 100


@dataclass(frozen=True)
class Source:
    """An opened data set: its format, its numbered rows, and the columns that it declares for all of them."""

    config: SourceConfig
    format: Format
    rows: Iterator[NumberedRow]
    declared: tuple[str, ...]


def open_source(config: SourceConfig) -> Source:
    """Open a data set and find its format by the first rows, unless it is configured.

    A row is `Unreadable` where it alone is damaged. Columns have the names of the format.

    Raises:
        UserError: the source is missing, empty, of an unknown kind or format, or damaged as a whole. While
            the rows are read: it is damaged further on.
    """
    configured = None if config.format == "auto" else format_named(config.format)
    for name in config.columns.keys() - KNOWN_COLUMNS:
        raise UserError(f"data.columns.{printable(name)}: no format reads a column of this name")
    read = _Reader(config)
    rows = islice(read, config.limit)
    head = list(islice(rows, DETECT_ROWS))
    readable = [row for _, row in head if not isinstance(row, Unreadable)]
    if not readable:
        reason = head[0][1].reason if isinstance(head[0][1], Unreadable) else ""
        raise UserError(f"{_name(config)}: no row can be read (row {head[0][0]}: {reason})")
    for name, column in config.columns.items():
        if not any(name in row for row in readable):
            raise UserError(f"data.columns.{name}={printable(column)}: {_name(config)} has no such column")
    form = configured or detect(readable, _name(config))
    return Source(config, form, chain(head, rows), read.declared)


def count_rows(config: DataConfig) -> int:
    """How many rows the data sets have, counted by reading them."""
    return sum(1 for source in config.sources() for _ in open_source(source).rows)


class _Reader:
    """Iterates over the rows of a data set, with the columns renamed; `declared` holds their names then."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.declared: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[NumberedRow]:
        number = 0
        try:
            rows, declared = _open(local_source(self.config), self.config)
            self.declared = tuple(_renaming(self.config)(dict.fromkeys(declared, "")))
            change = _change(self.config)
            for number, row in rows:
                yield number, row if isinstance(row, Unreadable) or change is None else change(row)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{_name(self.config)}: cannot be read after row {number} ({reason})") from None
        if not number:
            raise UserError(f"{_name(self.config)}: is empty, there are no rows")


def _name(config: SourceConfig) -> str:
    return f"data.path={printable(config.path)}"


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


def _open(path: Path, config: SourceConfig) -> Read:
    columns = frozenset({*KNOWN_COLUMNS, *config.columns.values()})
    try:
        is_file, exists = path.is_file(), path.exists()
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{_name(config)}: {first_line(error)}") from None
    if is_file:
        return read_file(DataFile(path, f"data.path={printable(str(path))}", columns))
    if exists and not path.is_dir():
        raise UserError(f"{_name(config)}: is neither a file nor a folder")
    if exists or (kind_of(path) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path)):
        return _datasets(path, config, columns)
    raise UserError(f"{_name(config)}: no such file or folder")


def _datasets(path: Path, config: SourceConfig, columns: frozenset[str]) -> Read:
    """A folder written by `save_to_disk`, else whatever `load_dataset` finds under that name."""
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(str(path))
            data = data if isinstance(data, datasets.Dataset) else data[config.split]
        else:
            data = datasets.load_dataset(str(path), split=config.split)
    except KeyError:
        raise UserError(f"data.split={config.split}: {_name(config)} has only {', '.join(data)}") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        beginning = "" if path.is_dir() else "no such file, and "
        raise UserError(
            f"{_name(config)}: {beginning}as a data set of split {config.split} it cannot be loaded "
            f"({_why_not_loaded(error)})"
        ) from None
    declared = tuple(data.column_names)
    data = data.select_columns([name for name in declared if name in columns])
    tables = data.with_format("arrow").iter(batch_size=ARROW_ROWS)
    return arrow_rows(batch for table in tables for batch in table.to_batches()), declared


def _why_not_loaded(error: Exception) -> str:
    """The reason in a line, without what the messages of Arrow quote: the row that it cannot parse."""
    from datasets.exceptions import DatasetGenerationError
    from datasets.table import CastError

    if isinstance(error, DatasetGenerationError) and (cause := error.__cause__) is not None:
        if isinstance(cause, CastError):
            return "its files do not have the same columns"
        return f"{type(cause).__name__} in one of its files"
    return type(error).__name__ if isinstance(error, pa.ArrowInvalid) else first_line(error)


def _change(config: SourceConfig) -> Callable[[RawRow], RawRow] | None:
    """What is done to every row before its format reads it; None for nothing."""
    rename = _renaming(config) if config.columns else None
    if kind_of(Path(config.path)) != ".csv":
        return rename
    return (lambda row: _typed(rename(row))) if rename else _typed


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
    """A CSV holds texts alone: those of a typed column are read; one that cannot be stays a text."""
    typed = {
        column: _CSV_TYPES[column].get(row[column].strip().lower(), row[column])
        for column in row.keys() & _CSV_TYPES.keys()
    }
    for column in _CSV_NUMBERS:
        if column in row and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", row[column]):
            typed[column] = float(row[column])
    return row | typed
