from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from bdpo.errors import UserError
from bdpo.storage.manifests import finished, write_manifest
from bdpo.storage.paths import write_text
from bdpo.storage.run_dir import RunDir, run_config
from bdpo.storage.sealed import sealed, unsealed
from tests.support.helpers import tiny_config


def test_a_run_folder_records_its_config_and_keeps_private_things_private(tmp_path):
    run = RunDir(tmp_path / "run")
    config = tiny_config(run.root, tmp_path, tmp_path)
    with run.open(config):
        pass
    assert run_config(run) == config
    assert run.private.stat().st_mode & 0o777 == 0o700


def test_temporary_files_of_killed_commands_are_removed_by_the_next(tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    config = tiny_config(run.root, tmp_path, tmp_path)
    run.open(config).release()
    with monkeypatch.context() as killed:  # a killed process neither renames nor removes its file
        killed.setattr(Path, "rename", lambda *_: None)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        write_text(run.scores / "part.parquet", "half")
        write_text(run.train / "deep" / "begun.json", "half")
    write_text(run.scores / ".part.parquet.keep", "not ours")
    temporary = [file for file in run.root.rglob(".*.*") if len(file.suffix) == 33]
    assert len(temporary) == 2
    run.open(config).release()
    assert not any(file.exists() for file in temporary)
    assert (run.scores / ".part.parquet.keep").exists()


def test_a_run_folder_is_for_one_command_at_a_time(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path, tmp_path)
    with RunDir(tmp_path / "run").open(config), pytest.raises(UserError, match="another command"):
        RunDir(tmp_path / "run").open(config)
    RunDir(tmp_path / "run").open(config)


def test_a_run_folder_that_could_not_be_opened_is_free_again(tmp_path):
    run = RunDir(tmp_path / "run")
    config = tiny_config(run.root, tmp_path, tmp_path)
    run.record(config)
    run.private.write_text("a file")
    with pytest.raises(UserError, match="cannot be written") as failed:
        run.open(config)
    run.private.unlink()
    with run.open(config):
        assert failed  # and what its traceback refers to


def test_a_folder_of_something_else_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"):
        RunDir(tmp_path).open(tiny_config(tmp_path, tmp_path, tmp_path))


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir(tmp_path / "file" / "run").open(tiny_config(tmp_path, tmp_path, tmp_path))


def recorded(tmp_path):
    run = RunDir(tmp_path / "run")
    run.record(tiny_config(run.root, tmp_path, tmp_path))
    return run


@pytest.mark.parametrize("damage", [b"\xff", b"[", b"", b"a: 1\n"])
def test_a_config_that_is_not_one_is_one_line(tmp_path, damage):
    run = recorded(tmp_path)
    run.config.write_bytes(damage)
    with pytest.raises(UserError, match=r"config.yaml: damaged, or not written by this version") as refused:
        run_config(run)
    assert "\n" not in str(refused.value)


def test_no_flipped_byte_of_a_config_is_taken(tmp_path):
    run, rng = recorded(tmp_path), random.Random(0)
    config, content = run_config(run), run.config.read_bytes()
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        run.config.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert run_config(run) == config


def test_a_stage_is_finished_with_the_same_inputs_only(tmp_path):
    manifest, inputs = tmp_path / "manifest.json", {"weights": "a", "dtype": "float32"}
    assert finished(manifest, inputs) is None
    write_manifest(manifest, inputs, rows=3)
    assert finished(manifest, dict(inputs))["rows"] == 3
    with pytest.raises(UserError, match="dtype=float32, now it is bfloat16"):
        finished(manifest, inputs | {"dtype": "bfloat16"})
    with pytest.raises(UserError, match="weights=a, now it is None"):
        finished(manifest, {"dtype": "float32"})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_broken_manifest_is_said_not_ignored(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="not a manifest"):
        finished(tmp_path / "manifest.json", {})


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    file = tmp_path / "manifest.json"
    write_manifest(file, {"weights": "a"}, pairs=10)
    file.write_text(file.read_text().replace("10", "11"))
    with pytest.raises(UserError, match=r"not a manifest of this version of bdpo, or damaged") as refused:
        finished(file, {"weights": "a"})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_a_manifest_of_another_version_is_refused(tmp_path, version):
    file = tmp_path / "manifest.json"
    write_manifest(file, {"weights": "a"})
    file.write_text(sealed(unsealed(file.read_text()) | {"version": version}))
    with pytest.raises(UserError, match=rf"manifest.json: version={version}, this .* fresh=true") as refused:
        finished(file, {"weights": "a"})
    assert "\n" not in str(refused.value)


def test_every_file_lies_where_people_look_for_it(tmp_path):
    run = RunDir(tmp_path)
    names = (
        "data",
        "pairs",
        "scores",
        "train",
        "model",
        "recoveries",
        "adapter",
        "metrics",
        "report",
        "tune",
    )
    places = {name: getattr(run, name).relative_to(tmp_path).as_posix() for name in names}
    assert places.pop("pairs") == "data/pairs"
    assert places.pop("recoveries") == "train/recoveries.jsonl"
    assert places.pop("metrics") == "metrics.jsonl"
    assert places == {name: name for name in places}
    assert run.eval("base") == tmp_path / "eval" / "base"
    assert run.responses("base") == tmp_path / "private" / "responses" / "base"
    assert run.replies("base") == tmp_path / "private" / "replies" / "base"
    assert run.attack("gcg", "base") == tmp_path / "attack" / "gcg" / "base"
    assert run.attack_texts("gcg", "base") == tmp_path / "private" / "attack" / "gcg" / "base"


def test_a_part_of_a_run_has_its_pairs_and_scores_and_results_of_its_own(tmp_path):
    run = RunDir(tmp_path)
    part = run.part("tune", "base")
    assert (part.root, part.private) == (tmp_path / "tune" / "base", tmp_path / "private" / "tune" / "base")
    assert (part.pairs, part.scores) == (run.pairs, run.scores)
    other = run.with_scores(tmp_path / "other")
    assert (other.root, other.pairs, other.scores) == (run.root, run.pairs, tmp_path / "other")
    for own_data, pairs in ((True, tmp_path / "tamper" / "data" / "pairs"), (False, run.pairs)):
        tampering = run.tampering(own_data)
        assert (tampering.root, tampering.pairs) == (tmp_path / "tamper", pairs)
        assert tampering.private == tmp_path / "private" / "tamper"


def test_a_model_is_there_with_its_config(tmp_path):
    run = RunDir(tmp_path)
    for folder, marker, is_there in (
        (run.model, "config.json", run.has_model),
        (run.adapter, "adapter_config.json", run.has_adapter),
    ):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        assert not is_there()
        (folder / marker).touch()
        assert is_there()
