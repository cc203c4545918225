"""What bdpo assumes of Ray's internals, against the installed Ray: a new Ray version fails here first."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from packaging.requirements import Requirement
from ray.train import ControllerError, WorkerGroupError
from ray.tune.execution import class_cache

from bdpo.config import TrainConfig
from bdpo.errors import StorageUnavailable, UserError
from pipelines.runtime import ray_internals
from pipelines.runtime.cli import exit_codes
from pipelines.runtime.ray_internals import full_node_line, keep_secrets
from tests.support import ROOT

METRICS = {
    "checkpoint_b": {"step": 20, "eval_loss": 0.4},
    "checkpoint_a": {"step": 10, "eval_loss": 0.2},
    "checkpoint_c": {"step": 30, "eval_loss": 0.6},
}


@pytest.mark.parametrize(
    ("chosen", "order"),  # what is deleted first stands first: the oldest, or the worst
    [
        ({}, "abc"),
        ({"metric_for_best_model": "loss", "eval_fraction": 0.1, "save_steps": 10, "eval_steps": 10}, "cba"),
    ],
)
def test_ray_reads_the_list_of_checkpoints(chosen, order):
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    text = ray_internals.checkpoint_list(METRICS, TrainConfig(**chosen))
    state = _CheckpointManagerState.model_validate_json(text)
    assert state.ray_version == ray.__version__
    assert [result.checkpoint_dir_name[-1] for result in state.checkpoint_results] == list(order)
    assert state.latest_checkpoint_result.checkpoint_dir_name == "checkpoint_c"
    assert state.checkpoint_report_indices == ["abc".index(letter) for letter in order]
    assert set(json.loads(text)) == set(_CheckpointManagerState.model_fields)


def test_ray_train_keeps_its_list_in_that_file():
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    assert ray_internals.CHECKPOINT_LIST == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def test_the_head_node_has_its_resource():
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert ray_internals.HEAD_NODE == HEAD_NODE_RESOURCE_NAME


def test_a_job_knows_itself_by_its_variable():
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert ray_internals.JOB_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR


def test_the_error_for_the_user_is_found_in_the_text_of_a_traceback():
    text = "ray::Map()\n  File ...\nbdpo.errors.UserError: a.csv, row 3: no prompt\n\nThe above exception ..."
    found = ray_internals.user_error_in(RuntimeError(text))
    assert isinstance(found, UserError)
    assert str(found) == "a.csv, row 3: no prompt"
    assert ray_internals.user_error_in(RuntimeError("ValueError: UserError: no")) is None
    unavailable = RuntimeError("bdpo.errors.StorageUnavailable: s3://b: no complete answer")
    assert str(ray_internals.user_error_in(unavailable)) == "s3://b: no complete answer"


def test_storage_without_an_answer_ends_a_command_in_one_line(capsys):
    unavailable = StorageUnavailable("s3://b at http://x: no complete answer within 60 s")
    for error in (unavailable, WorkerGroupError("two", {1: unavailable}), ControllerError(unavailable)):
        with pytest.raises(SystemExit) as ended, exit_codes():
            raise error
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: {unavailable}\n"


def test_the_range_that_is_admitted_is_the_range_that_was_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ranged,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    (tested,) = re.findall(r"tested with Ray (\d+\.\d+)", ray_internals.__doc__)
    major, minor = map(int, tested.split("."))
    assert str(ranged.specifier) in (f"<{major}.{minor + 1},>={tested}", f">={tested},<{major}.{minor + 1}")


FULL_NODE = (
    "The actor died.\n1 worker(s) were killed due to the node running low on memory. "
    "Memory on the node (IP: 10.0.0.7, ID: 12ab) was 22.91GB used / 24.00GB limit (0.954); Ray killed it.\n"
    "Top 10 memory users: PID\tMEM(GB)\tCOMMAND\n12\t5.20\tray::RayTrainWorker.execute\n"
    "13\t4.10\t/usr/bin/python -m other --key=canary\n14\t1.00\tray::TrainController\n15\t0.10\tbash"
)


def test_a_full_node_is_described_in_a_line_without_arguments_of_commands():
    error = ray.exceptions.RayActorError(error_msg=FULL_NODE)
    group = SimpleNamespace(worker_failures={0: ray.exceptions.OutOfMemoryError(FULL_NODE)})
    for each in (ray.exceptions.OutOfMemoryError(FULL_NODE), error, group):
        line = full_node_line(each)
        assert line == (
            "the memory of node 10.0.0.7 was full (22.91GB used / 24.00GB): "
            "5.20 GB ray::RayTrainWorker.execute, 4.10 GB python, 1.00 GB ray::TrainController"
        )
    assert full_node_line(ray.exceptions.RayActorError(error_msg="it crashed")) is None
    assert full_node_line(ValueError("x")) is None


def test_ray_describes_a_full_node_so():
    raylet = Path(ray.__file__).with_name("core") / "src" / "ray" / "raylet" / "raylet"
    content = raylet.read_bytes()
    formats = ["Memory on the node (IP: %s, ID: %s) was %sGB used / %sGB limit", "running low on memory"]
    assert all(text.encode() in content for text in formats)


def test_ray_says_that_its_own_node_did_not_start():
    from ray._private import node

    assert ray_internals.START_TIMED_OUT in inspect.getsource(node.Node).replace('"\n', "").replace('"', "")


SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


class Trial:
    """Any class."""


def sent(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "planted")
    options = class_cache._ActorClassCache().get(Trial)._default_options
    return options["runtime_env"]["env_vars"]


def test_no_key_of_object_storage_is_sent_with_a_trial(monkeypatch):
    """Ray's logs and API show what Tune sends."""
    names = set(class_cache.ENV_VARS_TO_PROPAGATE)
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", names)
    assert "planted" in sent(monkeypatch).values()  # what Ray does by itself
    keep_secrets()
    assert "planted" not in sent(monkeypatch).values()
    assert "PL_DISABLE_FORK" in sent(monkeypatch)
