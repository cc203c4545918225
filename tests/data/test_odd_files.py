"""Odd and damaged files are read, or refused in one line that names them; nothing half-written stays."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runtime.cli import exit_codes
from tests.support.data_files import SECRET, WRITERS, pair_row, refusal, write_jsonl, write_parquet

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
        ("rows.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("rows.json", json.dumps({"data": ROWS}, indent=1).encode()),
        ("rows.jsonl.bz2", bz2.compress(LINES[:40].encode()) + bz2.compress(LINES[40:].encode())),
        ("rows.jsonl.xz", lzma.compress(LINES[:40].encode()) + bytes(4) + lzma.compress(LINES[40:].encode())),
    ],
)
def test_another_shape_or_encoding_is_read(tmp_path, prepare_here, name, content):
    (tmp_path / name).write_bytes(content)
    assert prepare_here(tmp_path / name).kept == 3


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 12345678\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", LFS, "a Git LFS pointer instead of the file"),
        ("rows.parquet", LFS, "a Git LFS pointer instead of the file"),
        ("rows.csv", b"prompt,chosen,rejected,chosen\nq,a,b,c\n", "the column chosen stands 2 times"),
        ("rows.json", b'[{"prompt": "q", "prompt": "r"}]', "the key prompt stands twice"),
        ("rows.jsonl", LINES.encode("utf-16")[:-1], "not UTF-16, which its byte order mark names"),
        ("rows.jsonl", '{"prompt": "é"}'.encode("latin-1"), "no row can be read (row 1: not UTF-8)"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:40], "cannot be read after row"),
        ("rows.jsonl.gz", LINES.encode(), "cannot be read after row 0"),
        ("rows.jsonl.zst", LINES.encode(), "cannot be read after row 0"),
        ("rows.jsonl.xz", LINES.encode(), "cannot be read after row 0"),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode()) + b"and more", "cannot be read after row"),
        ("rows.jsonl.xz", lzma.compress(LINES.encode()) + b"and more", "cannot be read after row"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0) + b"and more", "cannot be read after row"),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode())[:-9], "cannot be read after row"),
        ("rows.jsonl.xz", lzma.compress(LINES.encode())[:-9], "cannot be read after row"),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode()) + bytes(4), "cannot be read after row"),
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


@pytest.mark.parametrize("indent", [None, 1])
def test_one_row_in_a_file_named_json(tmp_path, prepare_here, kept_pairs, indent):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[1], indent=indent))
    assert prepare_here(tmp_path / "rows.json").kept == 1
    assert kept_pairs()[0]["chosen"] == ROWS[1]["chosen"]


def test_bzip2_and_xz_of_many_blocks(tmp_path, prepare_here):
    lines = "".join(json.dumps(pair_row(i, chosen=str(i) * 999)) + "\n" for i in range(400)).encode()
    for name, pack in (("rows.jsonl.bz2", bz2.compress), ("rows.jsonl.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(lines))
        assert prepare_here(tmp_path / name, max_length=9999).kept == 400


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
    assert "chosen: the member content stands twice" in refusal(prepare_here, tmp_path / "rows.parquet")


def nested(members):
    """Three rows of a list of one object, which the format reads as a conversation."""
    objects = pa.StructArray.from_arrays(list(members.values()), list(members))
    return pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), objects)


ANSWER = {"role": pa.array(["assistant"] * 3), "content": pa.array(["a", "b", "c"])}

FAR = {
    "a far date": pa.array([None, 2**31 - 1, 0], pa.date32()),
    "a far time": pa.array([None, 2**62, 0], pa.timestamp("us")),
    "a far time in a zone": pa.array([None, 2**62, 0], pa.timestamp("us", "UTC")),
    "a far length of time": pa.array([None, 2**62, 0], pa.duration("s")),
    "a text that is not UTF-8": pa.array([None, b"\xff", b"a"]).view(pa.string()),
}


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("column", ["chosen", "system"])
@pytest.mark.parametrize("name", FAR)
def test_a_value_that_python_cannot_hold_is_a_bad_row(
    tmp_path, prepare_here, quarantined_rows, name, column, kind
):
    columns = {side: pa.array([row[side] for row in ROWS]) for side in ROWS[0]}
    odd = nested({**ANSWER, "timestamp": FAR[name]}) if column == "chosen" else FAR[name]
    table = pa.table({**columns, column: odd})
    source = tmp_path / f"rows.{kind}"
    if kind == "folder":
        datasets.Dataset(table).save_to_disk(source)
    else:
        pq.write_table(table, source)
    account = prepare_here(source)
    (reason, count) = account.quarantined.most_common(1)[0]
    assert reason.startswith(f"{column}: ")
    assert count == 1
    assert quarantined_rows()[0]["row"] == 2
    assert account.rows == 3


def test_a_time_zone_that_does_not_exist_is_named(tmp_path, prepare_here):
    chosen = nested({**ANSWER, "timestamp": pa.array([0] * 3, pa.timestamp("us", "Mars/Phobos"))})
    table = pa.table({"prompt": pa.array(["a", "b", "c"]), "chosen": chosen, "rejected": chosen})
    pq.write_table(table, tmp_path / "rows.parquet")
    message = refusal(prepare_here, tmp_path / "rows.parquet")
    assert str(tmp_path / "rows.parquet") in message
    assert "(row 1: chosen: a value that Python cannot hold (" in message


def test_a_column_whose_name_is_not_utf8(tmp_path, prepare_here):
    file = write_parquet(tmp_path / "rows.parquet", [row | {"ABCD": 1} for row in ROWS])
    file.write_bytes(file.read_bytes().replace(b"ABCD", b"A\xffCD"))
    assert f"data.path={file}: cannot be read after row 0 ('utf-8' codec" in refusal(prepare_here, file)


def test_a_member_that_stands_twice_is_named_at_any_depth(tmp_path, prepare_here):
    texts = pa.array(["x"] * 3)
    function = pa.StructArray.from_arrays([texts, texts], ["name", "name"])
    table = pa.table(dict.fromkeys(ROWS[0], texts) | {"tools": nested({"function": function})})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "tools: the member name stands twice" in refusal(prepare_here, tmp_path / "rows.parquet")


UNKNOWN = [{"frage": f"{SECRET} {i}", "gut": "a", "schlecht": "b"} for i in range(3)]


@pytest.mark.parametrize("kind", ["rows.parquet", "folder"])
def test_columns_that_no_format_knows_are_named(tmp_path, prepare_here, kind):
    source = WRITERS[kind](tmp_path / kind, UNKNOWN)
    message = refusal(prepare_here, source)
    assert f"{source}: columns frage,gut,schlecht fit no known format" in message
    assert "no known format; set data.columns, such as {prompt: question, " in message
    assert "(preference, preference_text, hh_rlhf, " in message
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    message = refusal(prepare_here, source, columns=columns | {"prompt": "farge"})
    assert message.endswith(
        f"data.columns.prompt=farge: data.path={source} has no such column, only frage, gut, schlecht"
    )
    assert prepare_here(source, columns=columns).kept == 3


def test_and_so_is_the_one_of_a_folder_of_texts(tmp_path, prepare_here, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(f"{SECRET}\nb\n")
    assert "columns text fit no known format" in refusal(prepare_here, tmp_path / "texts")


@pytest.mark.parametrize("name", ["br[1]", "a*b", "a?b", "a::b"])
def test_a_folder_whose_name_is_a_pattern(tmp_path, prepare_here, name):
    """The library `datasets` would read no file of it, or those of another folder."""
    folder = tmp_path / name / "rows"
    folder.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ROWS)
    assert f"data.path={folder}: the library datasets takes " in refusal(prepare_here, folder)
    assert prepare_here(folder / "a.jsonl").kept == 3


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
