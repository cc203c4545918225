"""Every container gives the same rows; a damaged row is told from a damaged file."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdpo.data.containers import Unreadable
from bdpo.errors import UserError
from bdpo.storage.paths import storage_path
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import Prepare
from tests.support.data_files import WRITERS, pair_row, read_numbered, refusal, write_csv, write_jsonl
from tests.support.helpers import save_model, tiny_config


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_the_same_pairs(tmp_path, prepare_here, kept_pairs, name):
    labels = {"group": "unsafe", "chosen_safe": True, "rejected_safe": False}
    rows = [pair_row(i, chosen=f'né, "{i}"\n石', **labels) for i in range(5)]
    account = prepare_here(WRITERS[name](tmp_path / name, rows))
    assert (account.rows, account.kept, account.sources[0].format) == (5, 5, "preference")
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    for pair, row, prompt in zip(kept_pairs(), rows, prompts, strict=True):
        assert pair | row | {"prompt": prompt} == pair


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "folder"])
def test_conversations_in_nested_columns(tmp_path, prepare_here, kept_pairs, name):
    rows = [
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": f"q{i}"}],
            "chosen": {"from": "gpt", "value": "no"},
            "rejected": {"from": "gpt", "value": "yes"},
        }
        for i in range(3)
    ]
    assert prepare_here(WRITERS[name](tmp_path / name, rows)).sources[0].format == "sharegpt"
    prompts = [[m["content"] for m in pair["prompt"]] for pair in kept_pairs()]
    assert prompts == [["s", f"q{i}"] for i in range(3)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "folder"])
def test_rows_on_object_storage_are_those_of_the_same_file_here(
    tmp_path, tiny_chat, bucket, monkeypatch, name
):
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    local = WRITERS[name](tmp_path / name, [pair_row(i) for i in range(3)])
    url = f"{bucket}/{tmp_path.name}/{name}"
    remote = storage_path(url, "x")
    remote.fs.put(str(local), remote.path, recursive=True)
    assert read_numbered(url) == read_numbered(local)
    config = tiny_config(tmp_path / "run", save_model(tmp_path / "model", tiny_chat), local)
    manifest = Prepare(config, RunDir(config.run_dir)).complete()
    moved = config.model_copy(update={"data": config.data.model_copy(update={"path": url})})
    assert Prepare(moved, RunDir(config.run_dir)).complete() == manifest  # the same content: no other data


def test_a_url_at_which_nothing_lies_is_named(bucket):
    for url in (f"{bucket}/gone.jsonl", "s3://no-such-bucket/rows.jsonl", "s4://a/rows.jsonl"):
        with pytest.raises(UserError, match=f"data.path={url}: [^\n]+$"):
            read_numbered(url)


def test_csv_reads_the_labels_of_pku(tmp_path, prepare_here, kept_pairs):
    row = {"prompt": "q", "response_0": "0", "response_1": "1", "better_response_id": 1}
    both = {"is_response_0_safe": True, "is_response_1_safe": True}
    rows = [{**row, **both}, {**row, **both, "is_response_0_safe": ""}]
    account = prepare_here(write_csv(tmp_path / "rows.csv", rows))
    assert account.quarantined == {"is_response_0_safe: null": 1}
    assert [(pair["chosen"], pair["group"]) for pair in kept_pairs()] == [("1", "safe")]


def test_a_limit_beyond_every_number_of_rows_is_none(tmp_path, prepare_here):
    assert prepare_here([pair_row(0)], limit=10**30).rows == 1


@pytest.mark.parametrize("name", WRITERS)
def test_a_split_of_data_without_splits_is_refused(tmp_path, prepare_here, name):
    source = WRITERS[name](tmp_path / name, [pair_row(0)])
    assert prepare_here(source, split="train").rows == 1
    assert "which has no splits; leave it out" in refusal(prepare_here, source, split="test")


def test_folder_with_splits(tmp_path, prepare_here):
    splits = {"train": [pair_row(0)], "test": [pair_row(1), pair_row(2)]}
    folder = tmp_path / "folder"
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder)
    assert prepare_here(folder, split="test").rows == 2
    assert "data.split=validation" in refusal(prepare_here, folder, split="validation")


def test_jsonl_rows_are_numbered_by_line(tmp_path):
    lines = [b"\xef\xbb\xbf" + json.dumps(pair_row(1)).encode(), b"", b"  ", pair_row(4), b"nope", b"7"]
    lines += [b"[" * 100_000, b'{"prompt": "\xff"}']
    rows = dict(read_numbered(write_jsonl(tmp_path / "rows.jsonl", lines)))
    reasons = {n: row.reason for n, row in rows.items() if isinstance(row, Unreadable)}
    assert reasons == {5: "not JSON", 6: "not an object", 7: "nested too deeply", 8: "not UTF-8"}
    assert (rows[1], rows[4]) == (pair_row(1), pair_row(4))


def test_csv_row_with_a_field_too_many_or_too_few(tmp_path, prepare_here, quarantined_rows):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\nq,n,y\nq2,n\nq3,n,y,z\n")
    account = prepare_here(tmp_path / "rows.csv")
    assert (account.kept, account.quarantined) == (1, {"wrong number of fields": 2})
    assert [row["row"] for row in quarantined_rows()] == [2, 3]


def test_csv_with_a_long_text(tmp_path, prepare_here):
    rows = [pair_row(0), pair_row(1, chosen="n" * 200_000)]
    assert prepare_here(write_csv(tmp_path / "rows.csv", rows)).kept == 2


def test_parquet_with_one_text_that_is_not_utf8(tmp_path, prepare_here, quarantined_rows):
    damaged = pa.array([b"fine", b"\xff\xfe", b"fine"]).view(pa.string())
    columns = {"prompt": pa.array(["q0", "q1", "q2"]), "chosen": damaged, "rejected": pa.array(["y"] * 3)}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    account = prepare_here(tmp_path / "rows.parquet")
    assert (account.kept, account.quarantined) == (2, {"chosen: not UTF-8": 1})
    assert quarantined_rows()[0]["row"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "no such file"),
        ("no/such/folder", None, "no such file"),
        ("rows.txt", b"x", "unknown suffix"),
        ("rows.json", b"", "is empty"),
        ("rows.jsonl", b"\n\n", "is empty"),
        ("rows.json", b"[]", "is empty"),
        ("rows.csv", b"prompt,chosen,rejected\n", "is empty"),
        ("rows.parquet", b"", "is empty"),
        ("rows.json", b'[{"a": 1},\n {"zebra": }]', "not valid JSON at line 2 column 12"),
        ("rows.json", b"[" * 100_000, "not valid JSON"),
        ("rows.json", b'{"a": 1}', "columns 1 unknown fit no known format"),
        ("rows.json", b"7", "expects a list of rows, found int"),
        ("rows.json", b'["zebra",\n"\xff"]', "not UTF-8 at byte 11 (line 2)"),
        ("rows.csv", b"prompt,chosen\n\xff,1", "not UTF-8 at byte 14 (line 2)"),
        ("rows.csv", b'prompt,chosen\n1,2\n1,"zebra', "not valid CSV at line 3"),
        ("rows.parquet", b"zebra zebra zebra", "cannot be read"),
        ("rows.jsonl", b'{"my question": "zebra"}', "columns 1 unknown fit no known format"),
        ("rows.jsonl", b"zebra", "no row can be read (row 1: not JSON)"),
        (
            "rows.jsonl",
            "zebra".encode("utf-16-le"),
            "(row 1: UTF-16 or UTF-32 without a byte order mark, or damaged)",
        ),
    ],
)
def test_useless_files_are_named(tmp_path, prepare_here, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    said = refusal(prepare_here, file)
    assert str(file) in said
    assert message in said
    assert not (tmp_path / "pairs").exists()
