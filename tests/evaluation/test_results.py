"""How far the evaluations of a run folder are, as all commands read it."""

from __future__ import annotations

from typing import get_args

import pytest

from bdpo.config.evaluate import ModelName
from bdpo.evaluation.capability import NOT_RUN
from bdpo.evaluation.results import finished_models, is_valid, missing_capability
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import Evaluate
from pipelines.runtime.stages import STAGES


@pytest.fixture
def run(tmp_path):
    """A run folder with an evaluation of `trained`, then of `base`."""
    run = RunDir(tmp_path)
    for name in ("trained", "base"):
        write_manifest(run.eval(name) / "summary.json", {}, valid=name == "base")
        (run.eval(name) / "scores.parquet").write_bytes(b"")
    return run


def test_every_evaluated_model_has_a_stage():
    names = [stage.model_name for stage in STAGES if issubclass(stage, Evaluate)]
    assert tuple(names) == get_args(ModelName)


def test_an_evaluation_is_finished_with_its_scores(run):
    assert list(finished_models(run)) == ["base", "trained"]
    assert [is_valid(folder) for folder in finished_models(run).values()] == [True, False]
    (run.eval("base") / "scores.parquet").unlink()
    assert list(finished_models(run)) == ["trained"]
    assert not is_valid(run.eval("base"))


def test_capability_that_could_not_be_run_is_missing(run):
    folder = run.eval("base")
    write_manifest(folder / "capability" / "hhh.json", {}, accuracy={})
    write_manifest(folder / "capability" / "gsm8k.json", {}, **{NOT_RUN: "no data"})
    assert missing_capability(folder, ["gsm8k", "hhh", "advglue"]) == ["gsm8k", "advglue"]
