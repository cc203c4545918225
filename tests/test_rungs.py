"""A training that stands still at rungs, against one that never does, at zero tolerance."""

import threading
import time

import pytest
import test_training
import torch
from test_training import metrics, score, trained, weights

from bdpo.rungs import Rungs
from bdpo.runs import RunDir

STEPS = 3
WORKER = test_training.WORKER.replace(
    "checkpoint, report)",
    'checkpoint, report, Rungs(run.root / "rungs", (1, 2)))',
).replace("from bdpo.runs", "from bdpo.rungs import Rungs\nfrom bdpo.runs")


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_chat):
    return score(tmp_path_factory.mktemp("scored"), tiny_chat)


def test_stopped_continued_and_left_alone_it_is_the_same_training(scored, tmp_path, monkeypatch):
    straight = weights(trained(scored, tmp_path / "straight", workers=2))

    monkeypatch.setattr(test_training, "WORKER", WORKER)
    run = RunDir(tmp_path / "run")
    rungs = Rungs(run.root / "rungs", (1, 2))
    handed_over = {}

    def judge():
        """As a trial's driver: looks at the model of each rung, then lets training go on, or ends it."""
        for step, answer in ((1, lambda: rungs.go_on(1)), (2, rungs.stop)):
            while not rungs.exported(step):
                time.sleep(0.05)
            handed_over[step] = weights(run)
            answer()

    watching = threading.Thread(target=judge)
    watching.start()
    trained(scored, run.root, workers=2)
    watching.join()
    assert len(metrics(run)) == 2
    assert any((handed_over[1][name] != handed_over[2][name]).any() for name in straight)
    assert any((handed_over[2][name] != straight[name]).any() for name in straight)

    rungs.reopen()
    rungs.go_on(2)
    rungs.take_back()  # the model was lost: its rung is handed over again, the same
    trained(scored, run.root, workers=2, checkpoint=run.root / "checkpoints" / "2")
    assert rungs.exported(2)
    assert not rungs.exported(1)
    ended = weights(run)
    assert all(torch.equal(ended[name], straight[name]) for name in straight)
    assert len(metrics(run)) == STEPS
