"""What every command refuses before it does anything."""

import pytest

from bdpo.errors import UserError
from pipelines.cli import command_config


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
