"""A prompt of a benchmark, and the strict reading of the files that benchmarks come in."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdpo.errors import UserError
from bdpo.storage import strict_json
from bdpo.storage.paths import require_fetched
from bdpo.storage.strict_json import RepeatedKey

CLUSTER = "cluster"


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark. Its texts are left out of its repr, so that no traceback quotes them."""

    item_id: str
    """Names the item in scores, logs and errors: stable, and unique over all benchmarks."""
    benchmark: str
    category: str
    prompt: str | None = field(repr=False)
    """What the model is given, a jailbreak around the request included; None where an attack found none."""
    request: str = field(repr=False)
    """What the judge is given: the request itself."""
    should_comply: bool
    prefill: str = field(default="", repr=False)
    """An answer whose first `prefill_tokens` tokens are put into the assistant's turn."""
    prefill_tokens: int = 0
    reference: str = field(default="", repr=False)
    """The true answer, where there is one to be compared with."""
    target: str = field(default="", repr=False)
    """How a compliant answer begins, where the benchmark has a text for it: what an attack aims at."""
    topic: str = ""
    """The kind of harm, where the category is something else (an attack, a depth): `evaluate.limit` is
    spread over both."""
    cluster: str = ""
    """What it asks about, where other items of the benchmark ask about the same: their verdicts are not
    independent, and intervals are made over clusters. Empty of an item that stands alone."""
    sample: int = 0
    """Which of several answers to the prompt the item is, see `evaluate.samples`."""


def required_file(path: str | None, key: str) -> str:
    """The path of a benchmark's file.

    Raises:
        UserError: the config has none under `key`.
    """
    if path is None:
        raise UserError(f"key {key} is missing: a benchmark of evaluate.benchmarks expects its file")
    return path


def read_csv(file: str | Path, columns: Sequence[str], required: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with exactly these columns, in any order; it may have `cluster`, too.

    Rows are counted from 1 after the header, as in all messages about data. No message quotes a cell.

    Raises:
        UserError: naming file, row and column, if a cell is missing, is not UTF-8, or is blank in a
            `required` column; naming the file if it cannot be read, has another header, or has no rows.
    """
    rows = []
    reader = csv.DictReader(_open(Path(file)), strict=True)
    try:
        columns = [*columns, *(name for name in reader.fieldnames or () if name == CLUSTER)]
        if sorted(reader.fieldnames or ()) != sorted(columns):
            raise UserError(f"{file}: expects the columns {','.join(columns)} in its first line")
        for number, row in enumerate(reader, 1):
            _check_row(row, columns, required, f"{file}, row {number}")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{file}, row {len(rows) + 1}: not valid CSV ({error})") from None
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows


def read_columns(file: str | Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Some columns of a CSV or JSON Lines file that may have others; every cell of them is a text, or a whole
    number, which becomes its digits.

    Rows are counted from 1, after the header of a CSV file. No message quotes a cell.

    Raises:
        UserError: naming file, row and column, if a row has no such column, or its cell is no text or blank;
            naming the file if it cannot be read, is neither CSV nor JSON Lines, or has no rows.
    """
    is_csv = Path(file).suffix.lower() == ".csv"
    rows = list(_csv_rows(Path(file), columns) if is_csv else _json_rows(Path(file)))
    if not rows:
        raise UserError(f"{file}: has no rows")
    for number, row in enumerate(rows, 1):
        where = f"{file}, row {number}"
        for column in columns:
            if column not in row:
                raise UserError(f"{where}: has no column {column}; it has {', '.join(map(str, row))}")
            if type(row[column]) is int:
                row[column] = str(row[column])  # as CSV has it: an id may be a number
            _check_cell(row[column], f"{where}, column {column}", required=True)
    return [{column: row[column] for column in columns} for row in rows]


def _csv_rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    reader, number = csv.DictReader(_open(file), strict=True), 0
    try:
        if twice := [name for name in columns if list(reader.fieldnames or ()).count(name) > 1]:
            raise UserError(f"{file}: the column {twice[0]} stands twice in its first line")
        for number, row in enumerate(reader, 1):
            _check_width(row, len(reader.fieldnames or ()), f"{file}, row {number}")
            yield row
    except csv.Error as error:
        raise UserError(f"{file}, row {number + 1}: not valid CSV ({error})") from None


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_open(file), 1):
        if not line.strip():
            continue
        try:
            row = strict_json.loads(line)
        except RepeatedKey:
            raise UserError(f"{file}, row {number}: a key stands twice") from None
        except (ValueError, RecursionError):  # the error's own text quotes the line
            raise UserError(f"{file}, row {number}: not valid JSON, expects CSV or JSON Lines") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: expects an object")
        yield row


def _open(file: Path) -> io.StringIO:
    """Bytes that are not UTF-8 become lone surrogates, so that the cell that has them can be named."""
    require_fetched(file)
    try:
        return io.StringIO(file.read_bytes().decode("utf-8-sig", "surrogateescape"), newline="")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _check_row(row: dict[str, str], columns: Sequence[str], required: Sequence[str], where: str) -> None:
    _check_width(row, len(columns), where)
    for column in columns:
        _check_cell(row[column], f"{where}, column {column}", column in required)


def _check_width(row: Mapping[str, Any], columns: int, where: str) -> None:
    if None in row:  # where DictReader puts the cells that have no column
        raise UserError(f"{where}: has more than {columns} cells")


def _check_cell(cell: Any, where: str, required: bool) -> None:
    if cell is None:
        raise UserError(f"{where}: is missing")
    if not isinstance(cell, str):
        raise UserError(f"{where}: expects a text")
    if not strict_json.is_unicode(cell):  # lone surrogates are how `_open` reads other bytes
        raise UserError(f"{where}: is not UTF-8")
    if required and not cell.strip():
        raise UserError(f"{where}: is empty")
