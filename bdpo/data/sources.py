"""Where raw rows come from: JSON, JSONL, Parquet, CSV, a folder or hub name for `datasets`.

A file or folder may lie on object storage: then its local copy is read. Rows are numbered from 1: the line
of a JSONL file, else the position in the source. JSONL, Parquet and `datasets` are streamed; JSON and CSV are
read whole. What the rows mean is left to `bdpo.data.formats`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bdpo.config import DataConfig
from bdpo.errors import UserError, first_line
from bdpo.storage.cache import cached_copy


@dataclass(frozen=True)
class Unreadable:
    """A row that is there but cannot be read: why, and what of it could be recovered."""

    reason: str
    raw: Any


Row = dict[str, Any]

NumberedRow = tuple[int, Row | Unreadable]


def read_rows(config: DataConfig) -> Iterator[NumberedRow]:
    """Yield (row number, row) of `data.path`; a row is `Unreadable` where it alone is damaged.

    Raises:
        UserError: the source is missing, empty, of an unknown kind, or damaged as a whole.
    """
    count = 0
    try:
        for count, row in enumerate(_open(local_source(config), config), 1):  # noqa: B007 (count is used below)
            yield row
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"data.path={config.path}: cannot be read after row {count} ({reason})") from None
    if not count:
        raise UserError(f"data.path={config.path}: is empty, there are no rows")


def local_source(config: DataConfig) -> Path:
    """`data.path` on this machine: a URL's cached copy; a hub name stays what it is.

    Raises:
        UserError: nothing can be read at the URL.
    """
    return cached_copy(config.path, "data.path") if "://" in config.path else Path(config.path)


def _open(path: Path, config: DataConfig) -> Iterator[NumberedRow]:
    if path.is_file():
        if path.suffix not in _READERS:
            raise UserError(f"data.path={config.path}: unknown suffix, wants one of {' '.join(_READERS)}")
        return _READERS[path.suffix](path) if path.stat().st_size else iter(())
    may_be_hub_name = path.suffix not in _READERS and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.path)
    if path.exists() or may_be_hub_name:
        return _datasets(path, config)
    raise UserError(f"data.path={config.path}: no such file or folder")


def _json(file: Path) -> Iterator[NumberedRow]:
    try:
        rows = json.loads(_utf8(file))
    except json.JSONDecodeError as error:
        raise UserError(
            f"data.path={file}: not valid JSON at line {error.lineno} column {error.colno} ({error.msg})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.path={file}: not valid JSON ({first_line(error)})") from None
    if not isinstance(rows, list):
        raise UserError(f"data.path={file}: wants a list of rows, found {type(rows).__name__}")
    return ((number, _object(row)) for number, row in enumerate(rows, 1))


def _jsonl(file: Path) -> Iterator[NumberedRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, _json_line(line)


def _json_line(line: bytes) -> Row | Unreadable:
    try:
        return _object(json.loads(line.decode()))
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except (ValueError, RecursionError):
        reason = "not JSON"
    return Unreadable(reason, line.decode(errors="backslashreplace"))


def _object(value: Any) -> Row | Unreadable:
    return value if isinstance(value, dict) else Unreadable("not an object", value)


def _csv(file: Path) -> Iterator[NumberedRow]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 131,072 characters
    reader = csv.DictReader(io.StringIO(_utf8(file), newline=""), strict=True)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                yield number, Unreadable("wrong number of fields", list(row.values()))
            else:
                yield number, {column: _csv_value(column, text) for column, text in row.items()}
    except csv.Error as error:
        raise UserError(
            f"data.path={file}: not valid CSV at line {reader.reader.line_num} ({error})"
        ) from None


_BOOLEAN = {"": None, "true": True, "false": False}

_CSV_TYPES: dict[str, dict[str, Any]] = {
    "group": {"": None},
    "better_response_id": {"": None, "0": 0, "1": 1},
    "chosen_safe": _BOOLEAN,
    "rejected_safe": _BOOLEAN,
    "is_response_0_safe": _BOOLEAN,
    "is_response_1_safe": _BOOLEAN,
}


def _csv_value(column: str, text: str) -> Any:
    """A CSV knows only texts: those of a typed column are read; one that cannot be stays a text."""
    return _CSV_TYPES.get(column, {}).get(text.strip().lower(), text)


def _parquet(file: Path) -> Iterator[NumberedRow]:
    with pq.ParquetFile(file) as parquet:
        yield from _arrow(parquet.iter_batches(batch_size=1024))


def _datasets(path: Path, config: DataConfig) -> Iterator[NumberedRow]:
    """A folder written by `save_to_disk`, else whatever `load_dataset` finds under that name."""
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(str(path))
            data = data if isinstance(data, datasets.Dataset) else data[config.split]
        else:
            data = datasets.load_dataset(str(path), split=config.split)
    except KeyError:
        raise UserError(
            f"data.split={config.split}: data.path={config.path} has only {', '.join(data)}"
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # Arrow's own messages quote the row that it cannot parse.
        why = type(error).__name__ if isinstance(error, pa.ArrowInvalid) else first_line(error)
        raise UserError(
            f"data.path={config.path}: no such file, and as a data set of split {config.split} it cannot be "
            f"loaded ({why})"
        ) from None
    tables = data.with_format("arrow").iter(batch_size=1024)
    return _arrow(batch for table in tables for batch in table.to_batches())


def _arrow(batches: Iterable[pa.RecordBatch]) -> Iterator[NumberedRow]:
    number = 0
    for batch in batches:
        try:
            rows: Iterable[Row | Unreadable] = batch.to_pylist()
        except UnicodeDecodeError:
            rows = (_decode(batch, row) for row in range(batch.num_rows))
        for row in rows:
            number += 1
            yield number, row


def _decode(batch: pa.RecordBatch, index: int) -> Row | Unreadable:
    row: Row = {}
    damaged = None
    for column in batch.schema.names:
        try:
            row[column] = batch[column][index].as_py()
        except UnicodeDecodeError:
            damaged, row[column] = damaged or column, None
    return Unreadable(f"{damaged}: not UTF-8", row) if damaged else row


_READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _utf8(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"data.path={file}: not UTF-8 at byte {error.start} (line {line})") from None
