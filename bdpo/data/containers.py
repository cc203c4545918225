"""Files of rows: JSON, JSON Lines, CSV and Parquet, also compressed with gzip, zstd, xz or bzip2.

Rows are numbered from 1: the line of JSON Lines, else the position in the file. JSON Lines and Parquet are
streamed; JSON and CSV are read into memory. A damaged row is yielded as `Unreadable`, a damaged file raises.
What the rows mean is left to `bdpo.data.formats`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bdpo.data.compressions import COMPRESSIONS
from bdpo.data.data_file import DataFile
from bdpo.errors import UserError, escaped, first_line
from bdpo.storage import strict_json
from bdpo.storage.paths import require_fetched
from bdpo.storage.strict_json import RepeatedKey


@dataclass(frozen=True)
class Unreadable:
    """A row that is there but cannot be read: why, and what of it could be recovered."""

    reason: str
    raw: Any


RawRow = dict[str, Any]

NumberedRow = tuple[int, RawRow | Unreadable]


class Read(NamedTuple):
    """The rows of a file, the columns that it declares once for all of them, what stands beside the rows."""

    rows: Iterator[NumberedRow]
    columns: tuple[str, ...] = ()  # none for JSON
    beside: tuple[str, ...] = ()  # keys of an object of JSON that has its rows under `data`


ARROW_ROWS = 1024  # rows that a columnar file is read in at a time

_LONGEST_NAME = 60

# What a file begins with that is no text.
_PACKED = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"PK\x03\x04": "a ZIP archive",
    b"PAR1": "Parquet",
}


def kind_of(path: Path) -> str | None:
    """The suffix that decides how a file is read, without that of its compression; None if it is unknown."""
    suffixes = _suffixes(path)
    is_compressed = len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2] if is_compressed else "".join(suffixes[-1:])
    compressed_parquet = kind == ".parquet" and is_compressed  # Parquet compresses itself
    return kind if kind in READERS and not compressed_parquet else None


def _suffixes(path: Path) -> list[str]:
    return [suffix.lower() for suffix in path.suffixes]


def known_suffixes() -> str:
    """The suffixes that are read, for a message."""
    return f"{' '.join(READERS)}, the first three also with {' '.join(COMPRESSIONS)}"


def read_file(file: DataFile) -> Read:
    """The rows of a file and its declared columns.

    Raises:
        UserError: the file is a Git LFS pointer, repeats a column, or cannot be read at all.
    """
    kind = kind_of(file.path)
    if kind is None:
        raise UserError(f"{file.name}: unknown suffix, expects one of {known_suffixes()}")
    require_fetched(file.path, file.name)
    with file.path.open("rb") as opened:
        start = opened.read(max(map(len, _PACKED)))
    packed = next((what for magic, what in _PACKED.items() if start.startswith(magic)), None)
    if packed and kind != ".parquet" and file.path.suffix.lower() not in COMPRESSIONS:
        raise UserError(f"{file.name}: its content is {packed}, which its name does not say; rename it")
    return READERS[kind](file) if file.path.stat().st_size else Read(iter(()))


def _json_or_lines(file: DataFile) -> Read:
    """JSON and JSON Lines under either suffix: the first character and line decide which one it is."""
    lines = (line for line in file.lines() if line.strip())
    first = next(lines, b"").lstrip()
    named_lines = ".jsonl" in _suffixes(file.path)
    is_list = first.startswith(b"[") and not (named_lines and _is_json(first) and next(lines, None))
    if is_list or not (named_lines or (_is_json(first) and next(lines, None))):
        return _json(file)
    return Read(_json_lines(file))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json(file: DataFile) -> Read:
    """The rows of a list, also of one under the key `data` of an object; any other object is one row."""
    beside: tuple[str, ...] = ()
    try:
        rows = strict_json.loads(file.text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file.name}: not valid JSON at line {error.lineno} column {error.colno} ({error.msg})"
        ) from None
    except RepeatedKey as error:
        raise UserError(f"{file.name}: not valid JSON ({_repeated(error)})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name}: not valid JSON ({first_line(error)})") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        beside = tuple(key for key in rows if key != "data")
        if others := [key for key in beside if _holds_rows(rows[key], file.columns)]:
            raise UserError(
                f"{file.name}: has rows under data and under {shown_name(others[0])}; those of one key are "
                "read, give each its own file"
            )
        rows = rows["data"]
    elif isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise UserError(f"{file.name}: expects a list of rows, found {type(rows).__name__}")
    return Read(((number, _object(row)) for number, row in enumerate(rows, 1)), beside=beside)


def _holds_rows(value: Any, columns: frozenset[str]) -> bool:
    """Whether a list of JSON has an object with a column that is read."""
    return isinstance(value, list) and any(
        isinstance(one, dict) and not columns.isdisjoint(one) for one in value
    )


def _json_lines(file: DataFile) -> Iterator[NumberedRow]:
    return ((number, _json_line(line)) for number, line in enumerate(file.lines(), 1) if line.strip())


def _json_line(line: bytes) -> RawRow | Unreadable:
    try:
        return _object(strict_json.loads(line.decode()))
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except RepeatedKey as error:
        reason = _repeated(error)
    except json.JSONDecodeError:
        reason = "UTF-16 or UTF-32 without a byte order mark, or damaged" if b"\0" in line else "not JSON"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:  # Python reads no number of more than 4,300 digits
        reason = "holds a number of too many digits"
    return Unreadable(reason, line.decode(errors="backslashreplace"))


def _repeated(error: RepeatedKey) -> str:
    return f"the key {shown_name(error.key)} stands twice"


def _object(value: Any) -> RawRow | Unreadable:
    return value if isinstance(value, dict) else Unreadable("not an object", value)


def shown_name(name: object) -> str:
    """The name of a column or key as a message shows it: short, on one line, without control characters."""
    text = escaped(str(name)) or "(no name)"
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _csv(file: DataFile) -> Read:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 131,072 characters
    text = file.text()
    header = text.partition("\n")[0]
    if "," not in header and (other := re.search(r"[;\t|]", header)):
        raise UserError(f"{file.name}: its columns are separated by {other[0]!r}; a comma is expected")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = tuple(reader.fieldnames or ())
    except csv.Error as error:
        raise UserError(f"{file.name}: not valid CSV at line 1 ({error})") from None
    _refuse_repeated(file, columns)
    return Read(_csv_rows(file, reader), columns)


def _csv_rows(file: DataFile, reader: csv.DictReader[str]) -> Iterator[NumberedRow]:
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                yield number, Unreadable("wrong number of fields", list(row.values()))
            else:
                yield number, row
    except csv.Error as error:
        raise UserError(f"{file.name}: not valid CSV at line {reader.reader.line_num} ({error})") from None


def _parquet(file: DataFile) -> Read:
    with pq.ParquetFile(file.path) as parquet:
        schema = parquet.schema_arrow
        _refuse_repeated(file, schema.names)
        read = [name for name in schema.names if name in file.columns]
    return Read(_parquet_rows(file, read), tuple(schema.names))


def _repeated_members(kind: pa.DataType) -> Iterator[str]:
    """The members that stand more than once in an object of a column of this type, at any depth."""
    inner = [kind.field(i) for i in range(kind.num_fields)]
    if pa.types.is_struct(kind):
        yield from (name for name, count in Counter(field.name for field in inner).items() if count > 1)
    for field in inner:
        yield from _repeated_members(field.type)


def _parquet_rows(file: DataFile, columns: list[str]) -> Iterator[NumberedRow]:
    with pq.ParquetFile(file.path) as parquet:
        yield from arrow_rows(parquet.iter_batches(batch_size=ARROW_ROWS, columns=columns))


def _refuse_repeated(file: DataFile, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{file.name}: the column {shown_name(name)} stands {count} times")


def arrow_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[NumberedRow]:
    """The rows of Arrow batches; one with a value that Python cannot hold is unreadable, the others are not.

    Such are texts that are not UTF-8, dates beyond the year 9999, unknown time zones, objects in which a
    member stands twice: the errors are of many classes, of Python, of Arrow and of the library of time zones.
    """
    number = 0
    for batch in batches:
        try:
            rows: Iterable[RawRow | Unreadable] = batch.to_pylist()
        except Exception:
            rows = (_decode(batch, row) for row in range(batch.num_rows))
        for row in rows:
            number += 1
            yield number, row


def _decode(batch: pa.RecordBatch, index: int) -> RawRow | Unreadable:
    row: RawRow = {}
    reasons = []
    for column in batch.schema.names:
        try:
            row[column] = batch[column][index].as_py()
        except Exception as error:  # see `arrow_rows`
            row[column] = None
            reasons.append(f"{shown_name(column)}: {_unheld(error, batch.schema.field(column).type)}")
    return Unreadable(reasons[0], row) if reasons else row


def _unheld(error: Exception, kind: pa.DataType) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if member := next(_repeated_members(kind), None):
        return f"the member {shown_name(member)} stands twice"
    return f"a value that Python cannot hold ({type(error).__name__})"


READERS: dict[str, Callable[[DataFile], Read]] = {
    ".json": _json_or_lines,
    ".jsonl": _json_or_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
