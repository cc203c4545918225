"""Trackers follow metrics.jsonl: read back with TensorBoard's own reader, each step is there once."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.runs import MetricsLog, RunDir
from bdpo.tracking import Tracking


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def config_of(run, *report_to):
    return parse_config(
        {
            "run_dir": str(run.root),
            "model": {"name_or_path": "m"},
            "data": {"path": "p"},
            "train": {"report_to": list(report_to)},
        },
        "test",
    )


def row(step):
    return {"step": step, "loss": 1 / (step + 1), "rewards/margins": float(step)}


def append(run, *steps):
    run.root.mkdir(exist_ok=True)
    for step in steps:
        MetricsLog(run.metrics).append(row(step))


def events(run, name):
    reader = EventAccumulator(str(run.train / "tensorboard"), purge_orphaned_data=False)
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


def test_every_step_is_there_once_after_a_worker_resumed_and_a_second_command(run):
    tracking = Tracking(config_of(run, "tensorboard"), run)
    append(run, 1, 2)
    tracking.follow()
    append(run, 3, 4, 5)
    tracking.follow()
    MetricsLog(run.metrics).keep(3)  # a worker came back from the checkpoint of step 3
    tracking.follow()
    append(run, 4)
    tracking.follow()
    append(run, 5, 6)
    tracking.close()
    for name in ("loss", "rewards/margins"):
        assert events(run, name) == [(s, pytest.approx(row(s)[name])) for s in range(1, 7)]

    MetricsLog(run.metrics).keep(4)  # a second command, from an earlier checkpoint
    tracking = Tracking(config_of(run, "tensorboard"), run)
    append(run, 5, 6, 7)
    tracking.close()
    assert [step for step, _ in events(run, "loss")] == list(range(1, 8))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_extra_that_is_missing_is_one_line(run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"report_to: {name} cannot be imported.*bdpo\[tracking\]"):
        Tracking(config_of(run, name), run)


def test_a_tracker_that_fails_is_said_and_does_not_stop_the_training(run, caplog):
    class Broken:
        def log(self, step, metrics):
            raise ConnectionError("no route to host")

    tracking = Tracking(config_of(run, "tensorboard"), run)
    tracking.trackers = {"mlflow": Broken(), **tracking.trackers}
    append(run, 1, 2)
    tracking.follow()
    tracking.close()
    assert "mlflow failed and gets no more metrics (no route to host)" in caplog.text
    assert [step for step, _ in events(run, "loss")] == [1, 2]


def test_no_tracker_is_a_choice(run):
    tracking = Tracking(config_of(run), run)
    append(run, 1)
    assert [json.dumps(line) for line in tracking.follow()] == [json.dumps(row(1))]
    tracking.close()
    assert not run.train.exists()
