"""Folders of data files: every row is read or accounted for with its file, whatever lies beside."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest

from bdpo.data.account import account_line
from tests.support.data_files import pair_row, refusal, write_csv, write_jsonl, write_parquet

ROWS = [pair_row(i) for i in range(5)]

SHAREGPT = {
    "conversations": [{"from": "human", "value": "q"}],
    "chosen": {"from": "gpt", "value": "no"},
    "rejected": {"from": "gpt", "value": "yes"},
}


@pytest.fixture
def folder(tmp_path):
    """A folder with one file of three rows."""
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "a.jsonl", ROWS[:3])
    return tmp_path / "rows"


def test_a_bad_row_has_the_name_of_its_file_and_its_number_there(folder, prepare_here, quarantined_rows):
    twice = b'{"prompt": "q", "chosen": "SAFE", "rejected": "b", "chosen": "HARMFUL"}'
    write_jsonl(folder / "b.jsonl", [ROWS[3], b"{nope", twice, pair_row(4, chosen=None)])
    account = prepare_here(folder)
    reasons = {"not JSON": 1, "the key chosen stands twice": 1, "chosen: null": 1}
    assert (account.kept, account.quarantined) == (4, reasons)
    assert [(row["file"], row["row"]) for row in quarantined_rows()] == [("b.jsonl", n) for n in (2, 3, 4)]
    assert "the first is row 2 of b.jsonl, " in refusal(prepare_here, folder, max_bad_fraction=0.0)


def test_files_may_have_columns_and_types_of_their_own(folder, prepare_here):
    ask, no, yes = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
    conversations = {"prompt": [ask], "chosen": [no], "rejected": [yes | {"content": "yes"}]}
    write_jsonl(folder / "b.jsonl", [ROWS[3] | {"note": 1}, conversations])
    account = prepare_here(folder)
    assert (account.kept, account.sources[0].unread) == (5, {"note"})


def test_the_columns_of_every_parquet_file_are_named(folder, prepare_here):
    (folder / "a.jsonl").unlink()
    write_parquet(folder / "a.parquet", [ROWS[0] | {"note": 1}])
    write_parquet(folder / "b.parquet", [ROWS[1] | {"score": 2.0}])
    account = prepare_here(folder)
    assert (account.kept, account.sources[0].unread) == (2, {"note", "score"})


def test_a_file_of_another_kind_is_named_in_the_account(folder, prepare_here):
    """`datasets` reads the files of the commonest kind, and says nothing of the others."""
    write_csv(folder / "b.csv", ROWS[3:])
    (folder / "LICENSE.txt").write_text("MIT")
    account = prepare_here(folder)
    assert (account.rows, account.sources[0].unread_files) == (3, {"b.csv"})
    assert account_line(account.to_json()).endswith("; files not read: b.csv")


def test_and_so_is_one_that_belongs_to_no_split(folder, prepare_here):
    (folder / "a.jsonl").rename(folder / "train.jsonl")
    (folder / "more").mkdir()
    (folder / "more" / "extra.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[3]).encode()))
    write_jsonl(folder / "test.jsonl", ROWS[4:])
    account = prepare_here(folder)
    assert (account.rows, account.sources[0].unread_files) == (3, {"more/extra.jsonl.gz"})


def test_labels_of_a_csv_in_a_folder_are_read(folder, prepare_here, kept_pairs):
    (folder / "a.jsonl").unlink()
    write_csv(folder / "a.csv", [row | {"chosen": "1", "chosen_safe": "true"} for row in ROWS])
    assert prepare_here(folder).kept == 5
    assert {(pair["chosen"], pair["chosen_safe"]) for pair in kept_pairs()} == {("1", True)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"other": 1}, ", b.jsonl: columns 1 unknown fit no known format"),
        (
            SHAREGPT,
            "a.jsonl is preference, b.jsonl is sharegpt; name the files in a list, or set data.format",
        ),
    ],
)
def test_a_file_of_another_format_is_named(folder, prepare_here, row, message):
    write_jsonl(folder / "b.jsonl", [row])
    assert message in refusal(prepare_here, folder)


def test_and_behind_the_first_rows_it_is_a_reason_for_each_row(folder, prepare_here, quarantined_rows):
    write_jsonl(folder / "a.jsonl", [pair_row(i) for i in range(120)])
    write_jsonl(folder / "b.jsonl", [SHAREGPT])
    assert prepare_here(folder).quarantined == {"chosen: wrong type": 1}
    assert [(row["file"], row["row"]) for row in quarantined_rows()] == [("b.jsonl", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.json", b"[{]", "b.json: not valid JSON at line 1 column 3"),
        ("b.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9], "cannot be read after row 0 of b.jsonl.gz"),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "b.jsonl: a Git LFS pointer"),
    ],
)
def test_a_damaged_file_is_named(folder, prepare_here, name, content, message):
    (folder / name).write_bytes(content)
    said = refusal(prepare_here, folder)
    assert message in said
    assert str(folder) in said


def test_a_slice_of_local_files_is_refused(folder, prepare_here):
    said = refusal(prepare_here, folder, split="train[:2]")
    assert said == "data.split=train[:2]: slices of local files are not read; set data.limit"


def test_a_saved_data_set_with_values_of_several_types_is_read_as_it_was(folder, prepare_here, kept_pairs):
    """The library keeps such a column as texts of JSON, a text in quotes."""
    rows = [
        {"prompt": "q1", "chosen": 'a\n"b"', "rejected": "é", "note": 1},
        {"prompt": "q2", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "c", "note": 1},
        {"prompt": "q3", "chosen": None, "rejected": "c", "note": 1},
    ]
    write_jsonl(folder / "a.jsonl", rows)
    data = datasets.load_dataset("json", data_files=str(folder / "a.jsonl"), split="train", cache_dir=folder)
    data.save_to_disk(folder / "saved")
    account = prepare_here(folder / "saved")
    assert (account.kept, account.quarantined) == (2, {"chosen: null": 1})
    assert [pair["chosen"] for pair in kept_pairs()] == ['a\n"b"', "a"]


def test_the_names_of_folders_are_columns(folder, prepare_here, kept_pairs):
    """Spark and Hive write the columns by which they part the rows into the names of folders alone."""
    for group, rows in (("safe", ROWS[:3]), ("unsafe", ROWS[3:])):
        part = folder / f"kind={group}" / "note=a%20b" / "chosen_safe=true"
        part.mkdir(parents=True)
        write_parquet(part / "part-0.parquet", rows)
    (folder / "a.jsonl").unlink()
    account = prepare_here(folder, columns={"group": "kind"})
    assert (account.kept, account.groups, account.sources[0].unread) == (
        5,
        {"safe": 3, "unsafe": 2},
        {"note"},
    )
    assert {pair["chosen_safe"] for pair in kept_pairs()} == {True}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_column_of_the_file_comes_before_the_name_of_its_folder(folder, prepare_here, kept_pairs, kind):
    (folder / "a.jsonl").unlink()
    part = folder / "group=safe" / "chosen_safe=__HIVE_DEFAULT_PARTITION__"
    part.mkdir(parents=True)
    write = {"csv": write_csv, "jsonl": write_jsonl}[kind]
    write(part / f"b.{kind}", [row | {"group": "unsafe"} for row in ROWS])
    assert prepare_here(folder).kept == 5
    assert {(pair["group"], pair["chosen_safe"]) for pair in kept_pairs()} == {("unsafe", None)}


@pytest.mark.parametrize("name", ["b.JSONL", "b.tsv"])
def test_a_file_of_rows_that_is_not_read_is_named(folder, prepare_here, name):
    write_jsonl(folder / name, ROWS[3:])
    assert prepare_here(folder).sources[0].unread_files == {name}
