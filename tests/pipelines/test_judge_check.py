"""The judge of a run is made sure of before anything else, here or on a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import EvaluateBase
from pipelines.runtime.judge_check import _make_on_a_worker, check_judge
from tests.support.helpers import save_model, tiny_config


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory, tiny_chat: ChatTokenizer) -> Config:
    """A config whose judge is a random model, of which nothing else is wrong."""
    folder = tmp_path_factory.mktemp("judge")
    save_model(folder, tiny_chat)
    judge = {"name": "harmbench", "model": str(folder)}
    return tiny_config(folder / "run", folder, folder, evaluate={"judge": judge})


def test_a_judge_that_is_not_checked_is_not_loaded(untrained: Config) -> None:
    evaluate = untrained.evaluate
    unchecked = evaluate.judge.model_copy(update={"check": False})
    config = untrained.model_copy(update={"evaluate": evaluate.model_copy(update={"judge": unchecked})})
    run = RunDir(config.run_dir)
    assert check_judge(config, run).endswith("weights and tokenizer are read")
    with pytest.raises(UserError, match="verdicts mean nothing"):
        check_judge(untrained, run)


def test_a_finished_evaluation_asks_its_judge_again_only_to_start_over(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs")
    run, again = RunDir(config.run_dir), config.model_copy(update={"fresh": True})
    assert "judge" in EvaluateBase(config, run).input_checks()
    write_manifest(run.eval("base") / "summary.json", {}, valid=True)
    (run.eval("base") / "scores.parquet").write_bytes(b"")
    assert "judge" not in EvaluateBase(config, run).input_checks()
    assert "judge" in EvaluateBase(again, run).input_checks()


@pytest.mark.ray
def test_what_a_worker_finds_is_one_line_here(untrained: Config) -> None:
    with pytest.raises(
        UserError, match=r"^evaluate\.judge\.model=.* known answers right.* say so$"
    ) as caught:
        _make_on_a_worker(untrained)
    assert "\n" not in str(caught.value)
