"""Odd and damaged files are read, or refused in one line that names them; nothing half-written stays."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runtime.cli import exit_codes
from tests.support.data_files import pair_row, refusal, write_jsonl

ROWS = [pair_row(i) for i in range(3)]

LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", LINES.encode()),
        ("rows.jsonl", json.dumps(ROWS).encode()),
        ("rows.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("rows.jsonl", LINES.encode("utf-16")),
        ("rows.json", json.dumps(ROWS).encode("utf-32")),
        ("rows.jsonl", b"\n\n" + LINES.encode("utf-8-sig")[3:] + b"\n\n"),
        ("rows.json", json.dumps(ROWS).encode("utf-8-sig")),
        ("rows.jsonl", LINES.replace("\n", "\r\n").encode()),
    ],
)
def test_another_shape_or_encoding_is_read(tmp_path, prepare_here, name, content):
    (tmp_path / name).write_bytes(content)
    assert prepare_here(tmp_path / name).kept == 3


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 12345678\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", LFS, "a Git LFS pointer instead of the data"),
        ("rows.parquet", LFS, "a Git LFS pointer instead of the data"),
        ("rows.csv", b"prompt,chosen,rejected,chosen\nq,a,b,c\n", "the column chosen stands 2 times"),
        ("rows.json", b'[{"prompt": "q", "prompt": "r"}]', "the key prompt stands twice"),
        ("rows.jsonl", LINES.encode("utf-16")[:-1], "not UTF-16, which its byte order mark names"),
        ("rows.jsonl", '{"prompt": "é"}'.encode("latin-1"), "no row can be read (row 1: not UTF-8)"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:40], "cannot be read after row"),
        ("rows.jsonl.gz", LINES.encode(), "cannot be read after row 0"),
        ("rows.jsonl.zst", LINES.encode(), "cannot be read after row 0"),
        ("rows.jsonl.xz", LINES.encode(), "cannot be read after row 0"),
        ("rows.parquet.gz", gzip.compress(b"PAR1", mtime=0), "unknown suffix"),
        ("rows.tsv", b"prompt\tchosen\n", "unknown suffix"),
        ("rows.json", b"nonsense", "not valid JSON"),
        ("rows.csv", b"a;b\n1;2\n", "its columns are separated by ';'; a comma is expected"),
        ("rows.csv", b"prompt\tchosen\n1\t2\n", "its columns are separated by '\\t'"),
    ],
)
def test_a_useless_file_is_named_and_leaves_nothing(tmp_path, prepare_here, name, content, message):
    (tmp_path / name).write_bytes(content)
    reason = refusal(prepare_here, tmp_path / name)
    assert str(tmp_path / name) in reason
    assert message in reason
    assert not (tmp_path / "pairs").exists()


def test_a_path_that_cannot_be_one(prepare_here):
    assert "data.path=a\\x00b.jsonl: " in refusal(prepare_here, None, path="a\0b.jsonl")


def test_a_row_that_repeats_a_key_is_quarantined(tmp_path, prepare_here, quarantined_rows):
    lines = [b'{"prompt":"q","chosen":"SAFE","rejected":"b","chosen":"HARMFUL"}', pair_row(1)]
    account = prepare_here(write_jsonl(tmp_path / "rows.jsonl", lines))
    assert (account.kept, account.quarantined) == (1, {"the key chosen stands twice": 1})
    assert "HARMFUL" in quarantined_rows()[0]["raw"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1] * 3, pa.date32()),
        pa.array([0] * 3, pa.timestamp("us", "Mars/Phobos")),
        pa.StructArray.from_arrays([pa.array([1] * 3), pa.array([2] * 3)], ["x", "x"]),
    ],
)
def test_a_column_that_no_format_reads_is_not_read(tmp_path, prepare_here, column):
    columns = {name: pa.array([row[name] for row in ROWS]) for name in ROWS[0]}
    pq.write_table(pa.table({**columns, "t": column}), tmp_path / "rows.parquet")
    account = prepare_here(tmp_path / "rows.parquet")
    assert (account.kept, account.sources[0].unread) == (3, {"t"})


def test_a_column_that_is_read_and_repeats_a_member_is_refused(tmp_path, prepare_here):
    texts = pa.array(["x"] * 3)
    column = pa.StructArray.from_arrays([texts, texts, texts], ["role", "content", "content"])
    table = pa.table({"prompt": texts, "chosen": column, "rejected": texts})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "chosen: the column content stands 2 times" in refusal(prepare_here, tmp_path / "rows.parquet")


def test_a_library_cannot_move_the_cursor(tmp_path, prepare_here):
    """Bytes of a damaged file come back in the messages of the library that reads it."""
    (tmp_path / "rows.parquet").write_bytes(b"PAR1\x15\x0e\x1b[2J" + b"\x1b" * 40 + b"\x20\x00\x00\x00PAR1")
    assert refusal(prepare_here, tmp_path / "rows.parquet").isprintable()


def test_a_command_ends_with_one_line_and_code_2(tmp_path, prepare_here, capsys):
    (tmp_path / "rows\x1b[31m.jsonl").write_bytes(LFS)
    with pytest.raises(SystemExit) as ended, exit_codes():
        prepare_here(tmp_path / "rows\x1b[31m.jsonl")
    message = capsys.readouterr().err
    assert (ended.value.code, message.count("\n"), "\x1b" in message) == (2, 1, False)
