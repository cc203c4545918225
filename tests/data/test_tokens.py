"""The token ids of prepared pairs, mapped from the machine's cache: those of the Parquet files, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdpo.data import tokens
from bdpo.data.pairs import ID_COLUMNS, pairs_digest, read_pairs
from bdpo.data.prepare import prepare
from bdpo.data.tokens import mapped_groups
from bdpo.errors import UserError
from bdpo.storage.checksums import CHECKSUMS
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from tests.support.helpers import groups_in_lists, invented_pairs, tiny_config, write_jsonl


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def prepared(tmp_path, tiny_chat):
    def run_of(name, pairs=20, seed=0):
        data = write_jsonl(tmp_path / f"{name}.jsonl", invented_pairs(pairs, seed))
        config, run = tiny_config(tmp_path / name, "x", data), RunDir(tmp_path / name)
        prepare(config.data, tiny_chat, run.pairs, run.private, seed=0)
        write_manifest(run.data / "manifest.json", {}, pairs_digest=pairs_digest(run.pairs))
        return run

    return run_of


def ids_of(run):
    return [list(pair.values()) for pair in read_pairs(run.pairs, 0, 99, ID_COLUMNS).to_pylist()]


def test_they_are_those_of_all_parts(prepared, monkeypatch, cache):
    monkeypatch.setattr("bdpo.data.prepare.PART_ROWS", 7)
    run = prepared("run")
    assert len(list(run.pairs.glob("*.parquet"))) == 3
    for _ in range(2):
        groups = mapped_groups(run)
        assert groups_in_lists(groups) == ids_of(run)
        assert not groups.tokens.flags.writeable
    assert len(list(cache.iterdir())) == 1


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[8] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["ids.i32", "lengths.i32", CHECKSUMS])
@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink])
def test_a_copy_that_is_damaged_is_made_again(prepared, cache, name, damage):
    run = prepared("run")
    before = groups_in_lists(mapped_groups(run))
    (copy,) = cache.iterdir()
    content = (copy / name).read_bytes()
    damage(copy / name)
    assert groups_in_lists(mapped_groups(run)) == before
    assert list(cache.iterdir()) == [copy]
    assert (copy / name).read_bytes() == content


def test_pairs_that_are_prepared_anew_are_copied_anew(prepared):
    mapped_groups(prepared("run"))
    again = prepared("run", pairs=9, seed=1)
    assert groups_in_lists(mapped_groups(again)) == ids_of(again)


def test_the_newest_copies_are_kept_and_those_of_killed_processes_removed(prepared, cache, monkeypatch):
    monkeypatch.setattr(tokens, "KEPT", 2)
    groups = [mapped_groups(prepared(f"run {number}", seed=number)) for number in range(2)]
    (cache / ".another.unfinished").mkdir()
    (cache / ".another.unfinished" / "ids.i32").write_bytes(b"x")
    old, new = sorted(cache.glob("[!.]*"), key=lambda folder: folder.stat().st_mtime)
    mapped_groups(prepared("another", seed=2))
    there = list(cache.iterdir())
    assert len(there) == 2
    assert old not in there
    assert new in there
    assert not list(cache.glob(".*"))
    assert groups_in_lists(groups[0]), "what is mapped stays readable"


def test_a_cache_that_cannot_be_written_is_named(prepared, cache):
    run = prepared("run")
    cache.parent.write_text("a file")
    with pytest.raises(UserError, match=r"cannot be copied to .*\(BDPO_CACHE\)"):
        mapped_groups(run)
