"""A training that stands still at rungs, against one that never does, at zero tolerance."""

from __future__ import annotations

import json
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from bdpo.storage.metrics_log import MetricsLog
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

# Keeps what the launcher is called for, and when; and the log's flushes.
EVENTS = """
import time
events = []
plain = training.Launcher, training.train, training.MetricsLog.flush
def noted(name, call):
    def noting(*arguments):
        events.append([str(name), time.perf_counter()])
        return call(*arguments)
    return noting
def begins(phase):
    events.append([str(phase), time.perf_counter()])
def train(*arguments):
    training.Launcher, training.train, _ = plain
    try:
        plain[1](*arguments)
    finally:
        training.MetricsLog.flush = plain[2]
        (run.root / "events.json").write_text(json.dumps(events))
training.Launcher = lambda reported, report: plain[0](
    noted("reported", reported), noted("report", report), begins
)
training.MetricsLog.flush = noted("flush", training.MetricsLog.flush)
training.train = train
"""

TRAINED = ["an optimizer step", "an evaluation on held-out pairs"]

WRITTEN = "the wait for a checkpoint to be written"

# Once what was on its way is committed, the state is copied; before a decision that is committed as well.
SAVED = ["flush", WRITTEN, "reported", "the copy of a checkpoint", WRITTEN, "report", "reported"]

DECIDED = ["the export of the model", "the wait for a decision"]


def decision(rungs, step, within=5.0):
    """What `Rungs.wait` returns; None if it waits longer."""
    found, waiting = [], threading.Thread(target=lambda: found.append(rungs.wait(step)), daemon=True)
    waiting.start()
    waiting.join(within)
    return found[0] if found else None


def test_what_is_exported_and_decided_is_in_files(tmp_path):
    rungs = Rungs(tmp_path / "rungs", (1, 2))
    assert not rungs.exported(1)
    rungs.withdraw_export()
    rungs.mark_exported(1)
    assert (rungs.exported(1), rungs.exported(2)) == (True, False)
    rungs.withdraw_export()
    assert not rungs.exported(1)
    rungs.clear_stop()
    assert decision(rungs, 1, within=2 * rungs.poll_seconds) is None
    rungs.promote(1)
    assert decision(rungs, 1) is True
    rungs.stop()
    assert decision(rungs, 1) is True
    assert decision(rungs, 2) is False
    rungs.clear_stop()
    assert list(rungs.folder.iterdir()) == [rungs.folder / "000000001.go"]


def test_a_training_waits_until_there_is_a_decision(tmp_path):
    rungs = Rungs(tmp_path, (1,))
    decided, waiting = [], threading.Thread(target=lambda: decided.append(rungs.wait(1)), daemon=True)
    waiting.start()
    waiting.join(2 * rungs.poll_seconds)
    assert not decided
    rungs.promote(1)
    waiting.join(60)
    assert decided == [True]


def test_every_phase_of_a_training_is_reported_and_a_checkpoint_waits_for_the_one_before(scored, tmp_path):
    """A worker's limits are those of its phases. The training is stopped at its second rung, and resumed."""
    train = {"eval_fraction": 0.1, "eval_steps": 100, "save_steps": 100}
    config = copied(scored, tmp_path / "run", train=train)
    run = RunDir(config.run_dir)
    (run.root / "fault.py").write_text(EVENTS)
    rungs = Rungs(run.root / "rungs", (1, 2))
    rungs.promote(1)
    rungs.stop()
    found = []
    for _ in range(2):
        launch([config], rungs=(1, 2))
        found.append(json.loads((run.root / "events.json").read_text()))
        assert (rungs.exported(1), rungs.exported(2)) == (True, True)
        rungs.clear_stop()
        rungs.promote(2)
    before, after = ([name for name, _ in events] for events in found)
    assert before == ["reported", *2 * [*TRAINED, *SAVED, *DECIDED]]
    assert after == ["reported", *DECIDED, *TRAINED, *SAVED, "the export of the model"]
    assert metrics(run, "step") == [1, 2, 3]
    (recovery,) = MetricsLog(run.recoveries).read()
    assert (recovery["step"], recovery["reached"], recovery["workers"]) == (2, 2, 1)
    phases = [pair for events in found for pair in pairwise(events) if pair[0][0] == TRAINED[0]]
    trained = np.diff([0, *metrics(run, "num_tokens")])
    for ((_, begun), (_, ended)), tokens, rate in zip(
        phases, trained, metrics(run, "tokens_per_second"), strict=True
    ):
        assert 0.1 * (ended - begun) < tokens / rate <= ended - begun


def test_one_worker_that_sees_no_decision_to_resume_ends_all_of_them(scored, tmp_path):
    """Not all see a file at the same moment, and those that resumed would wait for the others for ever."""
    config = copied(scored, tmp_path / "run")
    (tmp_path / "run" / "fault.py").write_text("Rungs.wait = lambda self, step: rank == 0")
    launch([config], workers=2, rungs=(1,))
    assert metrics(RunDir(config.run_dir), "step") == [1]


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
