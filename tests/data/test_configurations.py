"""A data set of several configurations or folders: the one that is named is read, and none is guessed."""

from __future__ import annotations

import json

import datasets
import pytest

from bdpo.config.data import SourceConfig
from tests.support.data_files import pair_row, refusal, write_jsonl

CARD = """---
configs:
- config_name: cats
  data_files:
  - split: train
    path: cats/train.jsonl
  - split: test
    path: cats/test.jsonl
- config_name: dogs
  data_files:
  - split: train
    path: dogs/train.jsonl
---
"""


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder as a data set on the hub has it: two configurations, and none is the default."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "published"
    for i, file in enumerate(("cats/train", "cats/test", "dogs/train")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / f"{file}.jsonl", [pair_row(f"{file} {n}") for n in range(i + 1)])
    (folder / "README.md").write_text(CARD)
    return folder


def test_the_named_one_is_read(published, prepare_here, kept_pairs):
    assert prepare_here(published, name="cats").kept == 1
    assert prepare_here(published, name="cats", split="test").kept == 2
    assert prepare_here(published, name="dogs").kept == 3
    assert kept_pairs()[0]["chosen"] == "no dogs/train 0"
    account = prepare_here(None, path=[{"path": str(published), "name": name} for name in ("cats", "dogs")])
    assert [part.kept for part in account.sources] == [1, 3]


@pytest.mark.parametrize(("name", "given"), [(None, "data.name: is not set"), ("mice", "data.name=mice")])
def test_without_a_name_they_are_named(published, prepare_here, name, given):
    message = refusal(prepare_here, published, name=name)
    assert message == f"{given}; data.path={published} has the configurations 'cats', 'dogs'"


def test_a_folder_inside_is_read(tmp_path, published, prepare_here):
    (published / "README.md").unlink()
    assert prepare_here(published, data_dir="dogs").kept == 3
    assert str(published) in refusal(prepare_here, published, data_dir="mice")


@pytest.mark.parametrize("key", ["name", "data_dir"])
def test_where_there_are_none_they_are_refused(tmp_path, prepare_here, key):
    row = pair_row(0)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]))
    split = datasets.Dataset.from_list([row])
    split.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "splits")
    for source in (file, tmp_path / "saved", tmp_path / "splits"):
        message = refusal(prepare_here, source, **{key: "cats"})
        assert message.startswith(f"data.{key}=cats: data.path={source} is ")
        assert message.endswith("; leave it out")
        assert prepare_here(source).kept == 1


def test_keys_that_are_not_set_are_in_no_fingerprint():
    """Runs from before these keys were there go on as they are."""
    assert {"name", "data_dir"}.isdisjoint(SourceConfig(path="a").model_dump())
    assert SourceConfig(path="a", name="cats").model_dump()["name"] == "cats"
