"""What is read of a row is what its format takes; every other column is named, and cannot spoil the row."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.data_files import pair_row, refusal, write_json, write_jsonl, write_parquet

TURN = {"role": "user", "content": "Rain?"}

RATED = [{"overall_score": 1, "response": "yes"}, {"overall_score": 2, "response": "no"}]

# Rows of which a format takes one column and not another that it knows as well.
BESIDE = {
    "context": (
        {"context": [TURN], "response1": "a", "response2": "b", "overall_preference": -1, "prompt": "other"},
        {"prompt"},
    ),
    "rated lists": (
        {"prompt": "q", "instruction": "o", "generations": ["a", "b"], "ratings": [1, 2], "rating": [2, 1]},
        {"instruction", "rating"},
    ),
    "rated objects": (
        {"instruction": "q", "completions": RATED, "generations": ["x", "y"], "ratings": [1, 2]},
        {"generations", "ratings"},
    ),
    "answers": (
        {"question": "q", "chosen": "a", "rejected": "b", "chosen_response": "c", "rejected_response": "d"},
        {"chosen_response", "rejected_response"},
    ),
    "empty ones": (
        {"instruction": "q", "completions": RATED, "generations": [], "ratings": None},
        set(),
    ),
    "one of no format": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "note": "n"},
        {"note"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_columns_beside_those_that_are_taken_are_named(prepare_here, name):
    row, unread = BESIDE[name]
    account = prepare_here([row])
    assert (account.kept, account.sources[0].unread) == (1, unread)


def test_a_column_is_read_if_one_row_needs_it(tmp_path, prepare_here, kept_pairs):
    """Both are named all the same: something in each of them was not read."""
    rows = [{"prompt": "q", "instruction": "other", "completions": RATED},
            {"prompt": None, "instruction": "q2", "completions": RATED}]  # fmt: skip
    for source in (write_jsonl(tmp_path / "r.jsonl", rows), write_parquet(tmp_path / "r.parquet", rows)):
        assert prepare_here(source).sources[0].unread == {"instruction"}
        assert [pair["prompt"][0]["content"] for pair in kept_pairs()] == ["q", "q2"]


PLAIN = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}

ODD = {
    "a far date": pa.array([10**8, 1], pa.date32()),
    "no zone": pa.array([0, 1], pa.timestamp("us", "Mars/Phobos")),
    "a member twice": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["x", "x"]),
    "bytes": pa.array([b"\xff", b"\xfe"]).view(pa.string()),
}


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("column", ["rating", "context", "history", "answers", "conversations", "t"])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_column_of_another_format_spoils_nothing(tmp_path, prepare_here, name, column, kind):
    table = pa.table({**PLAIN, column: ODD[name]})
    source = tmp_path / f"rows.{kind}"
    if kind == "folder" and name != "a member twice":  # the library refuses it
        datasets.Dataset(table).save_to_disk(source)
    else:
        source = tmp_path / "rows.parquet"
        pq.write_table(table, source)
    for form in ("auto", "preference"):
        if (form, column) != ("auto", "conversations"):  # it fits two formats
            account = prepare_here(source, format=form)
            assert (account.kept, account.sources[0].unread) == (2, {column})


def test_the_same_column_is_read_where_it_is_mapped(tmp_path, prepare_here):
    pq.write_table(pa.table({**PLAIN, "rating": ODD["a far date"]}), tmp_path / "rows.parquet")
    message = refusal(
        prepare_here, tmp_path / "rows.parquet", columns={"system": "rating"}, max_bad_fraction=0
    )
    assert "rating: a value that Python cannot hold" in message


def test_a_mapped_column_leaves_its_name_in_the_file_unread(tmp_path, prepare_here, kept_pairs):
    table = (
        pa.table({**PLAIN, "question": ["x", "y"]})
        .drop(["prompt"])
        .append_column("prompt", ODD["a far date"])
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    account = prepare_here(tmp_path / "rows.parquet", columns={"prompt": "question"})
    assert (account.kept, account.sources[0].unread) == (2, {"prompt (in the file)"})
    assert kept_pairs()[0]["prompt"][0]["content"] == "x"


def test_keys_beside_the_rows_of_a_json_file_are_named(tmp_path, prepare_here):
    content = {"version": 1, "prompt": "none", "authors": [{"name": "a"}], "data": [pair_row(0), pair_row(1)]}
    account = prepare_here(write_json(tmp_path / "rows.json", content))
    assert account.kept == 2
    assert account.sources[0].unread == {
        f"{key} (beside the rows)" for key in ("version", "prompt", "authors")
    }


def test_rows_under_two_keys_are_refused(tmp_path, prepare_here):
    content = {"data": [pair_row(0)], "test": ["", pair_row(1)]}
    message = refusal(prepare_here, write_json(tmp_path / "rows.json", content))
    assert "rows.json: has rows under data and under test" in message
