"""A log of JSON lines survives torn and damaged lines: they are dropped and reported, the others stand."""

from __future__ import annotations

import json
import random

import pytest

from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import storage_path


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 0.1 * step, "name": "ü"})
    return log


def steps(log):
    return [row["step"] for row in log.read()]


def test_rows_are_read_back_as_they_were_appended(log):
    assert log.read()[1] == {"step": 2, "loss": 0.2, "name": "ü"}


def test_lines_are_json_that_any_reader_understands(log):
    lines = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_rows_after_the_checkpoint_are_dropped_and_an_unfinished_line_does_not_count(log, caplog):
    with log.file.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert steps(log) == [1, 2, 3]
    assert not caplog.records  # another process may be writing it
    log.keep(2)
    assert [json.loads(line)["step"] for line in log.file.read_text().splitlines()] == [1, 2]


def test_a_row_after_an_unfinished_line_is_not_lost_with_it(log, caplog):
    with log.file.open("a") as stream:
        stream.write('{"step": 4, "lo')
    log.append({"step": 5})
    assert steps(log) == [1, 2, 3, 5]
    assert [record.getMessage() for record in caplog.records] == [
        f"{log.file}: damaged lines are left out (1): 4"
    ]


def test_a_changed_digit_is_noticed(log, caplog):
    log.file.write_text(log.file.read_text().replace('"step": 2', '"step": 7'))
    assert steps(log) == [1, 3]
    assert steps(log) == [1, 3]
    assert len(caplog.records) == 1  # reported once, however often the log is read
    assert "damaged lines are left out (1): 2" in caplog.text


def test_a_log_of_damaged_lines_is_one_warning(log, caplog):
    log.file.write_text('{"step": 1}\n' * 500)
    assert steps(log) == []
    (record,) = caplog.records
    assert record.getMessage() == f"{log.file}: damaged lines are left out (500): 1, 2, 3, ..."


def test_a_line_without_a_digest_is_damaged(log):
    with log.file.open("a") as stream:
        stream.write('{"step": 4}\n[1]\n\n')
    assert steps(log) == [1, 2, 3]


def test_no_flipped_byte_is_taken_for_a_row(log):
    rows, content, rng = log.read(), log.file.read_bytes(), random.Random(0)
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        log.file.write_bytes(damaged)
        assert all(row in rows for row in log.read()), bytes(damaged)


def test_the_folder_of_a_log_is_made(tmp_path):
    log = MetricsLog(tmp_path / "train" / "recoveries.jsonl")
    log.append({"step": 1})
    assert steps(log) == [1]


def test_on_object_storage_another_writer_adds_to_the_rows(tmp_path):
    """Rows are kept until they are flushed, and those of the writer before stay."""
    file = storage_path(f"memory://{tmp_path.name}/metrics.jsonl", "run_dir")
    first, second = MetricsLog(file), MetricsLog(file)
    for step in (1, 2, 3):
        first.append({"step": step})
    assert steps(first) == [1]  # the others are written every ten seconds
    first.flush()
    second.append({"step": 4})
    assert steps(second) == [1, 2, 3, 4]
