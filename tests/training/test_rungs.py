"""A training that stands still at rungs, against one that never does, at zero tolerance."""

from __future__ import annotations

import threading

import pytest
import torch

from bdpo.storage.run_dir import RunDir
from bdpo.training.rungs import Rungs
from tests.support.training import (
    copied,
    launch,
    metrics,
    score,
    trained,
    weights,
)

pytestmark = pytest.mark.long

STEPS = 3


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_chat):
    return score(tmp_path_factory.mktemp("scored"), tiny_chat)


def test_stopped_continued_and_left_alone_it_is_the_same_training(scored, tmp_path):
    straight = weights(trained(scored, tmp_path / "straight", workers=2))

    config = copied(scored, tmp_path / "run")
    run = RunDir(config.run_dir)
    rungs = Rungs(run.root / "rungs", (1, 2))
    handed_over, over = {}, threading.Event()

    def judge():
        """As a trial's driver: looks at the model of each rung, then lets training continue, or ends it."""
        for step, answer in ((1, lambda: rungs.promote(1)), (2, rungs.stop)):
            while not rungs.exported(step):
                if over.wait(0.05):
                    return
            handed_over[step] = weights(run)
            answer()

    watching = threading.Thread(target=judge)
    watching.start()
    try:
        launch([config], workers=2, rungs=(1, 2))
    finally:
        over.set()
        watching.join()
    assert len(metrics(run)) == 2
    assert any((handed_over[1][name] != handed_over[2][name]).any() for name in straight)
    assert any((handed_over[2][name] != straight[name]).any() for name in straight)

    rungs.clear_stop()
    rungs.promote(2)
    rungs.withdraw_export()  # the model was lost: its rung is handed over again, the same
    launch([config], workers=2, rungs=(1, 2))
    assert rungs.exported(2)
    assert not rungs.exported(1)
    ended = weights(run)
    assert all(torch.equal(ended[name], straight[name]) for name in straight)
    assert len(metrics(run)) == STEPS
