"""No flipped byte in a file of a run folder is taken silently; `tests.system.flip_bytes` makes many more."""

from __future__ import annotations

from tests.support.flipped_bytes import FAULTS, files_read, flip, small_run


def test_flipped_bytes_are_refused_or_dropped(tmp_path):
    run = small_run(tmp_path / "run")
    files = {file: file.read_bytes() for file in files_read(run)}
    counts = flip(run, flips=120, seed=0)
    assert counts.total() == 120
    assert not {key: number for key, number in counts.items() if key[1] in FAULTS}
    assert {what for _, what in counts} >= {"refused", "dropped"}
    assert {file: file.read_bytes() for file in files_read(run)} == files
