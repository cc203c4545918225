"""Rows of preference files, written into every container that the project reads."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdpo.config.data import SourceConfig
from bdpo.data.sources import open_source
from bdpo.errors import UserError

SECRET = "zebra"


def pair_row(i, **changes):
    return {"prompt": f"question {i} {SECRET}", "chosen": f"no {i}", "rejected": f"yes {i}", **changes}


def write_jsonl(path, rows):
    """Rows are objects, or bytes to be written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows))
    return path


def write_datasets(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


WRITERS = {
    "rows.json": write_json,
    "rows.jsonl": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "folder": write_datasets,
}


def refusal(call, *args, **kwargs):
    """The message of the UserError: one line, and without any text of the data."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def read_numbered(path, **config):
    """(row number, row) of a data file, as its format would be given them."""
    return list(open_source(SourceConfig(path=str(path), **config)).rows)
