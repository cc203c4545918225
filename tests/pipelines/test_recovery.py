"""Trainings on a Ray cluster that are killed, and failures that no retry would help."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from bdpo.config import load_config
from bdpo.errors import UserError
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from pipelines.runtime.fit import _begin
from tests.support.killed_training import kill_training, score_and_train_without_ray

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def account(training_inputs, training_nodes):
    """What the death of a worker, of the driver and of a node cost, one after the other."""
    score_and_train_without_ray(training_inputs / "config.yaml", training_inputs)
    kills = [("worker", "copy"), ("driver", "write"), ("node", "step")]
    return kill_training(training_nodes, training_inputs / "config.yaml", training_inputs, kills, 0, [])


def test_a_training_that_is_killed_ends_with_the_same_weights(account):
    """`kill_training` itself compares weights and metrics."""
    assert len(account.kills) == account.recovered == 3
    assert account.partial == 0


def test_a_checkpoint_that_was_copied_and_never_committed_is_not_resumed_from(tmp_path):
    """A worker dies between the last byte and the commit: training resumes from the one before."""
    from pipelines.runtime.recovery import remove_uncommitted

    for name in ("checkpoint_1", "checkpoint_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("whole")
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    committed = SimpleNamespace(checkpoint=SimpleNamespace(path=str(tmp_path / "checkpoint_1")))
    remove_uncommitted(tmp_path, [committed])
    left = {"checkpoint_1", "checkpoint_manager_snapshot.json"}
    assert {file.name for file in tmp_path.iterdir()} == left
    remove_uncommitted(tmp_path, [])
    assert not (tmp_path / "checkpoint_1").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_checkpoint_that_finds_no_room_in_the_run_folder_is_no_reason_to_try_again(tmp_path, number):
    from pipelines.runtime.recovery import Recovery

    with pytest.raises(UserError, match=r"the disk is full.*the same command resumes"):
        Recovery(tmp_path / "begun.json").after_exception(None, {1: OSError(number, "")})
    Recovery(tmp_path / "begun.json").after_exception(None, {1: OSError(errno.EIO, "")})


def test_steps_without_a_record_of_how_they_were_made_are_not_resumed_from(training_inputs, tmp_path):
    """Unlike those of a training that was killed before its first checkpoint, however far it came."""
    config, run = load_config(training_inputs / "config.yaml"), RunDir(tmp_path)
    assert _begin(config, run, {"seed": 0}, 9) is None
    MetricsLog(run.metrics).append({"step": 99})
    assert _begin(config, run, {"seed": 0}, 9) is None
    (run.train / "begun.json").unlink()
    with pytest.raises(UserError, match="no intact checkpoint to resume from"):
        _begin(config, run, {"seed": 0}, 9)
