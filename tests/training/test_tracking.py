"""Trackers follow metrics.jsonl: read back from what they wrote, each step is there once.

The trackers' libraries are imported by the tests of them: every process of a test run collects this module.
"""

from __future__ import annotations

import json
import sys
import threading

import pytest

from bdpo.config import parse_config
from bdpo.errors import UserError
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from bdpo.training import tracking as module
from bdpo.training.tracking import Tracking
from tests.support.evaluation import SECRETS


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
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def track_by_two_commands(run, name):
    """The second resumes from an earlier checkpoint than the first had reached."""
    append(run, 1, 2, 3)
    for steps in ((), (3, 4)):
        MetricsLog(run.metrics).keep(3 if not steps else 2)
        tracking = Tracking(config_of(run, name), run)
        tracking.follow()
        append(run, *steps)
        tracking.close()
        assert name in tracking.trackers  # it has not failed


def test_mlflow_has_every_step_once(run, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.root.parent}/mlflow.db")
    track_by_two_commands(run, "mlflow")
    (there,) = MlflowClient().search_runs([MlflowClient().get_experiment_by_name("bdpo").experiment_id])
    assert (there.info.run_name, there.info.status, there.data.params) == ("run", "FINISHED", {})
    for name in ("loss", "rewards/margins"):
        points = MlflowClient().get_metric_history(there.info.run_id, name)
        assert [(p.step, p.value) for p in points] == [(s, row(s)[name]) for s in range(1, 5)]


def test_mlflow_without_a_server_writes_no_database_anywhere(run, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"mlflow cannot be started \(set MLFLOW_TRACKING_URI\)"):
        Tracking(config_of(run, "mlflow"), run)


def test_weights_and_biases_has_every_step_once(run, monkeypatch):
    """Offline: what `wandb sync` would send, one file a command."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    track_by_two_commands(run, "wandb")
    wandb.teardown()  # what the end of a process does: its service writes what it still has
    first, second = (list(sent(file)) for file in sorted(run.train.glob("wandb/offline-*/*.wandb")))
    for records, steps in ((first, range(1, 4)), (second, range(1, 5))):
        assert {record.run.run_id for record in records if record.HasField("run")} == {
            (run.train / "wandb.id").read_text()
        }
        logged = [
            {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for record in records
            if record.HasField("history")
        ]
        assert [line["_step"] for line in logged] == list(steps)
        assert [line["loss"] for line in logged] == [row(step)["loss"] for step in steps]


def sent(file):
    """Records of an offline run: after seven bytes, each behind checksum (4), length (2) and kind (1)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at = file.read_bytes(), 7
    while at + 7 <= len(content):
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        record = Record()
        record.ParseFromString(content[at + 7 : at + 7 + length])
        yield record
        at += 7 + length


def test_no_secret_of_a_tracker_is_kept(run, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    tracking = Tracking(config_of(run, "wandb", "mlflow"), run)
    append(run, 1, 2)
    tracking.close()
    wandb.teardown()
    kept = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert any(b"rewards/margins" in content for content in kept.values())
    assert [file for file, content in kept.items() for v in SECRETS.values() if v.encode() in content] == []


def test_a_tracker_that_does_not_answer_stops_nothing(run, monkeypatch, caplog):
    never = threading.Event()
    monkeypatch.setattr(module, "TRACKER_SECONDS", 0.2)
    tracking = Tracking(config_of(run, "tensorboard"), run)
    monkeypatch.setattr(tracking.trackers["tensorboard"], "log", lambda *_: never.wait())
    append(run, 1)
    assert len(tracking.follow()) == 1
    assert "tensorboard failed and gets no more metrics (no answer within 0.2 s)" in caplog.text
    assert tracking.trackers == {}
    never.set()


def test_a_tracker_that_ends_its_process_ends_no_training(run, monkeypatch, caplog):
    """Libraries call sys.exit for a bad key: in a thread that would be waited for in vain."""
    tracking = Tracking(config_of(run, "tensorboard"), run)
    monkeypatch.setattr(tracking.trackers["tensorboard"], "log", lambda *_: sys.exit("bad key"))
    append(run, 1)
    assert len(tracking.follow()) == 1
    assert "tensorboard failed and gets no more metrics (bad key)" in caplog.text


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
