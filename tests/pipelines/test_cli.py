"""What every command refuses before it does anything."""

from __future__ import annotations

import resource
import sys

import pytest

from bdpo.errors import UserError
from bdpo.storage.manifests import write_manifest
from pipelines.runtime.cli import command_config, main


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("{run_dir: runs/first, model: {name_or_path: sandbox}, data: {path: x}}")
    return str(file)


def test_a_job_does_not_lose_its_results_with_its_folder(file, monkeypatch):
    assert command_config(file, []).run_dir == "runs/first"  # a command on one's own machine
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="run_dir=runs/first: a job runs in a folder of its own"):
        command_config(file, [])
    for lasting in ("/shared/runs/first", "~/runs/first", "s3://bucket/runs/first"):
        assert command_config(file, [f"run_dir={lasting}"]).run_dir == lasting


def test_a_full_disk_is_said_in_one_line_whatever_is_being_written(file, tmp_path, monkeypatch, capsys):
    """A limit on the size of files: the system refuses the write."""
    monkeypatch.setattr(sys, "argv", ["score", "--config", file, f"run_dir={tmp_path}/run"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def stage(config, run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        write_manifest(run.data / "manifest.json", {"weights": "a" * 2000})

    try:
        with pytest.raises(SystemExit) as ended:
            main(stage, "", lambda run: [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.value.code == 2
    said = f"error: run_dir={tmp_path}/run: cannot be written (File too large)\n"
    assert capsys.readouterr().err.endswith(said)


def test_another_error_of_the_system_is_not_taken_for_it(file, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score", "--config", file, f"run_dir={tmp_path}/run"])
    with pytest.raises(FileNotFoundError):
        main(lambda config, run: (tmp_path / "nothing").read_text(), "", lambda run: [])
