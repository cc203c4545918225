"""The judge of a run is made sure of before anything else, here or on a worker."""

from __future__ import annotations

import pytest

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.run_dir import RunDir
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


@pytest.mark.ray
def test_what_a_worker_finds_is_one_line_here(untrained: Config) -> None:
    with pytest.raises(
        UserError, match=r"^evaluate\.judge\.model=.* known answers right.* say so$"
    ) as caught:
        _make_on_a_worker(untrained)
    assert "\n" not in str(caught.value)
