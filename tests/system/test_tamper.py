"""The tamper test from its command to its page."""

from __future__ import annotations

import shutil

import pytest

from bdpo.config import load_config
from bdpo.storage.digests import files_digest
from bdpo.storage.manifests import read_manifest
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import Prepare
from pipelines.tamper import Tamper
from tests.support.commands import run_command
from tests.support.helpers import save_model
from tests.support.pipeline import PAIRS, TAMPER_SETTINGS, TAMPER_STEPS, pipeline_inputs


def aligned_run(inputs, folder):
    """A run folder as after its training: prepared pairs and an aligned model."""
    config = load_config(inputs / "config.yaml", [f"run_dir={folder}", *TAMPER_SETTINGS])
    run = RunDir(config.run_dir)
    with run.open(config):
        Prepare(config, run).complete()
    shutil.copytree(inputs / "aligned", run.model)
    return config, run


@pytest.mark.ray
def test_the_tampered_model_is_evaluated_beside_the_aligned_one(tmp_path, tiny_chat):
    inputs = pipeline_inputs(tmp_path, tiny_chat)
    save_model(inputs / "aligned", tiny_chat, seed=1)
    config, run = aligned_run(inputs, tmp_path / "run")
    before = files_digest(sorted(run.model.iterdir()), run.model)
    command = "pipelines.tamper", "--config", inputs / "config.yaml", f"run_dir={run.root}", *TAMPER_SETTINGS
    done = run_command(*command)
    assert done.code == 0, done.err
    assert "tampered" in done.out
    assert "judged by string_matching, a screen" in " ".join(done.out.split())
    assert files_digest(sorted(run.model.iterdir()), run.model) == before
    training = Tamper(config, run).training
    manifest = read_manifest(training.manifest_file)
    assert manifest["steps"] == TAMPER_STEPS
    assert manifest["pairs"] == {"prepared": PAIRS, "trained on": PAIRS // 2, "trained on, safe": PAIRS // 2}
    assert training.run.has_adapter()
    assert run_command("pipelines.report", run.root).code == 0
    page = (run.report / "report.html").read_text()
    assert f"{TAMPER_STEPS} more steps with LoRA" in page
    again = run_command(*command)
    assert again.code == 0
    assert read_manifest(training.manifest_file) == manifest
