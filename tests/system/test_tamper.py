"""The tamper test from its command to its page, undisturbed and killed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from bdpo.config import Config, load_config
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.digests import files_digest
from bdpo.storage.manifests import read_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import Prepare
from pipelines.tamper import Tamper
from tests.support.commands import kill_with_cluster, run_command, start_alone
from tests.support.helpers import save_model
from tests.support.pipeline import PAIRS, TAMPER_SETTINGS, pipeline_inputs

STEPS = 30

SETTINGS = (*TAMPER_SETTINGS, f"tamper.steps={STEPS}")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_chat: ChatTokenizer) -> Path:
    """What a run is made from, with a second model that stands for the aligned one."""
    folder = pipeline_inputs(tmp_path_factory.mktemp("inputs"), tiny_chat)
    save_model(folder / "aligned", tiny_chat, seed=1)
    return folder


def aligned_run(inputs: Path, folder: Path) -> tuple[Config, RunDir]:
    """A run folder as after its training: prepared pairs and an aligned model."""
    config = load_config(inputs / "config.yaml", [f"run_dir={folder}", *SETTINGS])
    run = RunDir(config.run_dir)
    with run.open(config):
        Prepare(config, run).complete()
    shutil.copytree(inputs / "aligned", str(run.model))
    return config, run


def tamper(inputs: Path, run: RunDir) -> list[str]:
    """The arguments of the command."""
    return ["pipelines.tamper", "--config", str(inputs / "config.yaml"), f"run_dir={run.root}", *SETTINGS]


def digest(run: RunDir) -> str:
    """Of all files of the model in a run folder."""
    return files_digest(sorted(run.model.iterdir()), run.model)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: Path) -> Tamper:
    """The stage of a tamper test that nobody disturbed, and that left the aligned model as it was."""
    config, run = aligned_run(inputs, tmp_path_factory.mktemp("undisturbed") / "run")
    before = digest(run)
    done = run_command(*tamper(inputs, run))
    assert done.code == 0, done.err
    assert "tampered" in done.out
    assert "judged by string_matching, a screen" in " ".join(done.out.split())
    assert digest(run) == before
    return Tamper(config, run)


@pytest.mark.ray
def test_the_tampered_model_is_evaluated_beside_the_aligned_one(inputs: Path, undisturbed: Tamper) -> None:
    run, training = undisturbed.run, undisturbed.training
    manifest = read_manifest(training.manifest_file)
    assert manifest is not None
    assert manifest["steps"] == STEPS
    assert manifest["pairs"] == {"prepared": PAIRS, "trained on": PAIRS // 2, "trained on, safe": PAIRS // 2}
    assert training.run.has_adapter()
    assert run_command("pipelines.report", run.root).code == 0
    page = Path(str(run.report / "report.html")).read_text()
    assert f"{STEPS} more steps with LoRA" in page
    again = run_command(*tamper(inputs, run))
    assert again.code == 0
    assert read_manifest(training.manifest_file) == manifest


@pytest.mark.ray
def test_a_killed_one_resumes_and_tampers_as_much(inputs: Path, undisturbed: Tamper, tmp_path: Path) -> None:
    """Killed with its cluster once a second checkpoint is begun, then run to its end on another cluster."""
    config, run = aligned_run(inputs, tmp_path / "run")
    training = Tamper(config, run).training.run
    before, checkpoints = digest(run), Path(str(training.train)) / "ray"
    process = start_alone("-m", *tamper(inputs, run))
    deadline = time.monotonic() + 300
    while len(list(checkpoints.glob("checkpoint_*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_with_cluster(process)
    assert not training.has_model()
    done = run_command(*tamper(inputs, run))
    assert done.code == 0, done.err
    assert [row["step"] for row in MetricsLog(training.metrics).read()] == list(range(1, STEPS + 1))
    [recovery] = MetricsLog(training.recoveries).read()
    assert 0 < recovery["step"] < STEPS
    assert digest(run) == before
    assert digest(training) == digest(undisturbed.training.run)
    summary = read_manifest(run.eval("tampered") / "summary.json")
    assert summary is not None
    assert summary["valid"]
