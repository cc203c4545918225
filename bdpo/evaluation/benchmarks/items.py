"""A prompt of a benchmark, and the strict reading of the files that benchmarks come in."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bdpo.errors import UserError

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
    topic: str = ""
    """The kind of harm, where the category is something else (an attack, a depth): `evaluate.limit` is
    spread over both."""
    cluster: str = ""
    """What it asks about, where other items of the benchmark ask about the same: their verdicts are not
    independent, and intervals are made over clusters. Empty of an item that stands alone."""


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
            raise UserError(f"{file}: wants the columns {','.join(columns)} in its first line")
        for number, row in enumerate(reader, 1):
            _check_row(row, columns, required, f"{file}, row {number}")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{file}, row {len(rows) + 1}: not valid CSV ({error})") from None
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows


def _open(file: Path) -> io.StringIO:
    """Bytes that are not UTF-8 become lone surrogates, so that the cell that has them can be named."""
    try:
        return io.StringIO(file.read_bytes().decode("utf-8-sig", "surrogateescape"), newline="")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _check_row(row: dict[str, str], columns: Sequence[str], required: Sequence[str], where: str) -> None:
    if None in row:  # where DictReader puts the cells that have no column
        raise UserError(f"{where}: has more than {len(columns)} cells")
    for column in columns:
        if row[column] is None:
            raise UserError(f"{where}, column {column}: is missing")
        if any("\udc80" <= character <= "\udcff" for character in row[column]):
            raise UserError(f"{where}, column {column}: is not UTF-8")
        if column in required and not row[column].strip():
            raise UserError(f"{where}, column {column}: is empty")
