from __future__ import annotations

import resource

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.errors import UserError
from bdpo.storage.paths import storage_path
from bdpo.storage.shards import ShardStore
from benchmarks.storage import counted_requests

SCHEMA = pa.schema([("row", pa.int64())])


def rows(first, count):
    return pa.table({"row": range(first, first + count)}, schema=SCHEMA)


@pytest.fixture
def store(tmp_path):
    return ShardStore(tmp_path / "shards", SCHEMA, {"weights": "a", "dtype": "float32"})


def test_shards_read_back_in_order_whatever_the_order_of_writing(store):
    for first in (4, 0, 2):
        store.write(first, rows(first, 2))
    assert store.finished() == {0: 2, 2: 2, 4: 2}
    assert store.read()["row"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert store.read_shard(2)["row"].to_pylist() == [2, 3]


def test_a_shard_is_recognised_by_first_row_and_length(store):
    store.write(2, rows(2, 3))
    assert store.holds(2, 3)
    assert not store.holds(2, 2)
    assert not store.holds(2, 4)
    assert not store.holds(0, 3)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.data())
def test_missing_shards_complete_the_rows_exactly_once(tmp_path_factory, total, size, other_size, data):
    store = ShardStore(tmp_path_factory.mktemp("shards"), SCHEMA, {})
    planned = store.missing(total, size)
    for first, count in data.draw(st.lists(st.sampled_from(planned), unique=True)) if planned else []:
        store.write(first, rows(first, count))
    for first, count in store.missing(total, other_size):
        assert count <= other_size
        store.write(first, rows(first, count))
    assert store.missing(total, size) == []
    assert store.read()["row"].to_pylist() == list(range(total))


@given(st.integers(1, 40), st.integers(1, 9), st.sets(st.integers(0, 39)))
def test_rows_that_are_given_up_are_not_asked_for_and_all_others_are(tmp_path_factory, total, size, given_up):
    store = ShardStore(tmp_path_factory.mktemp("shards"), SCHEMA, {})
    given_up = {row for row in given_up if row < total}
    asked = [
        row for first, count in store.missing(total, size, given_up) for row in range(first, first + count)
    ]
    assert asked == [row for row in range(total) if row not in given_up]


def test_a_shard_stays_though_rows_of_it_are_given_up(store):
    """Another attempt at it got through."""
    for first, count in ((0, 3), (4, 1)):
        store.write(first, rows(first, count))
    assert store.missing(6, 6, given_up={0, 1, 4, 5}) == [(3, 1)]
    assert store.finished() == {0: 3, 4: 1}


def test_of_shards_that_overlap_one_goes(store):
    """A retried task may cut its rows otherwise than the first time."""
    for first, count in ((0, 4), (2, 2), (3, 3)):
        store.write(first, rows(first, count))
    for first, count in store.missing(6, 6):
        store.write(first, rows(first, count))
    assert store.read()["row"].to_pylist() == list(range(6))


def test_what_could_not_be_written_leaves_nothing(store):
    store.folder.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write(0, rows(0, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(store.folder.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-7], lambda content: content[:40] + b"x" + content[41:]]
)
def test_a_damaged_shard_is_made_again(store, damage):
    shard = store.write(0, rows(0, 3))
    shard.write_bytes(damage(shard.read_bytes()))
    assert store.missing(3, 3) == [(0, 3)]
    assert not shard.exists()


def test_what_a_killed_process_left_half_written_does_not_count(store):
    shard = store.write(0, rows(0, 3))
    shard.rename(shard.with_name(f".{shard.name}.123"))
    assert store.read().num_rows == 0
    assert store.missing(3, 3) == [(0, 3)]
    assert not list(store.folder.iterdir())  # it may be private text


def test_rows_that_a_retried_task_wrote_twice_count_once(store):
    store.write(0, rows(0, 2))
    store.write(0, rows(5, 2))
    once = store.read()
    assert once.num_rows == 2
    assert store.missing(2, 2) == []
    assert len(list(store.folder.iterdir())) == 1
    assert store.read() == once


def test_readers_skip_what_is_damaged_and_remove_nothing(store):
    """They do not have the run's lock."""
    damaged, whole = store.write(0, rows(0, 2)), store.write(2, rows(2, 2))
    content = damaged.read_bytes()[:-1]
    damaged.write_bytes(content)
    again = store.write(0, rows(0, 2).replace_schema_metadata({"again": ""}))
    assert store.finished() == {0: 2, 2: 2}
    assert store.read()["row"].to_pylist() == [0, 1, 2, 3]
    assert store.read_shard(0)["row"].to_pylist() == [0, 1]
    assert set(store.folder.iterdir()) == {damaged, whole, again}
    assert damaged.read_bytes() == content


@pytest.mark.parametrize("name", ["part-00000-c000.snappy.parquet", "part-0.csv", "pairs.parquet"])
@pytest.mark.parametrize("use", [lambda store: store.missing(4, 2), ShardStore.read, ShardStore.finished])
def test_a_file_of_another_program_is_refused_and_nothing_is_removed(store, name, use):
    damaged = store.write(0, rows(0, 2))
    damaged.write_bytes(b"")
    (store.folder / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: not a shard"):
        use(store)
    assert {file.name for file in store.folder.iterdir()} == {damaged.name, name}


def test_a_shard_that_vanishes_while_it_is_read_is_skipped(store, monkeypatch):
    gone, left = store.write(0, rows(0, 2)), store.write(2, rows(2, 2))
    read_bytes = type(gone).read_bytes

    def removed_by_another(file):
        gone.unlink(missing_ok=True)
        return read_bytes(file)

    monkeypatch.setattr(type(gone), "read_bytes", removed_by_another)
    assert store.missing(4, 2) == [(0, 2)]
    assert list(store.folder.iterdir()) == [left]


def test_shards_of_other_inputs_are_refused_by_field(store):
    store.write(0, rows(0, 2))
    other = ShardStore(store.folder, SCHEMA, store.fingerprint | {"weights": "b"})
    damaged = other.write(2, rows(2, 2))
    damaged.write_bytes(b"")
    for use in (other.finished, other.read, lambda: other.missing(4, 2), lambda: other.read_shard(0)):
        with pytest.raises(UserError, match="weights=a, now it is b"):
            use()
    assert damaged.exists()


def test_what_starts_at_a_row_is_found_among_the_others(tmp_path):
    for folder in (tmp_path, storage_path("memory://shards-from", "run_dir")):
        store = ShardStore(folder, SCHEMA, {})
        for first in (0, 1, 10, 100):
            store.write(first, rows(first, 1))
        for first in (0, 1, 10, 100):
            assert store.read_shard(first)["row"].to_pylist() == [first]
        assert not store.holds(11, 1)
        store.remove(1)
        assert list(store.finished()) == [0, 10, 100]


def test_private_shards_are_readable_by_their_owner_alone(tmp_path):
    store = ShardStore(tmp_path / "private", SCHEMA, {}, mode=0o600)
    assert store.write(0, rows(0, 1)).stat().st_mode & 0o777 == 0o600
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_on_object_storage_shards_are_read_many_at_a_time(bucket):
    """One list and one request a shard, none for its size before; of 40 of them at most 32 at a time."""
    store = ShardStore(storage_path(f"{bucket}/shards", "run_dir"), SCHEMA, {"weights": "a"})
    for first in range(0, 80, 2):
        store.write(first, rows(first, 2))
    with counted_requests() as requests:
        assert store.read()["row"].to_pylist() == list(range(80))
    assert (requests.of("get_object"), requests.of("list_objects_v2"), len(requests.spans)) == (40, 1, 41)
    assert requests.in_a_row() < 20
    with counted_requests() as requests:
        assert store.holds(78, 2)
        assert not store.holds(80, 2)
        assert store.read_shard(76)["row"].to_pylist() == [76, 77]
    assert (requests.of("get_object"), requests.of("list_objects_v2"), len(requests.spans)) == (2, 3, 5)
    with counted_requests() as requests:
        assert store.missing(82, 2) == [(80, 2)]
    assert (requests.of("get_object"), requests.of("list_objects_v2"), len(requests.spans)) == (40, 1, 41)
