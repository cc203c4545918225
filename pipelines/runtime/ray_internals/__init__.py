"""Everything that depends on Ray beyond its documented interface, tested with Ray 2.60.

`pyproject.toml` admits the versions that were tested and no later minor version. What is here has to be
checked again before that range grows; `tests/pipelines/test_ray_internals.py` compares each of these with
what Ray itself does.

Ray is imported inside functions, and by the module `elastic` of this package, which derives from classes of
Ray: a command that refuses its config must not wait for it. `tests/test_layers.py` makes sure that no private
name of Ray is anywhere else.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bdpo.config import TrainConfig
from bdpo.errors import StorageUnavailable, UserError

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""The file in a run's folder in which Ray Train lists its committed checkpoints; read when a run resumes."""

HEAD_NODE = "node:__internal_head__"
"""A resource that the head node alone has, 1 of it."""

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""An environment variable of the commands that `ray job submit` starts."""

START_TIMED_OUT = "timed out during startup"
"""The message of `ray.init`, in a bare `Exception`, when its own node is not there after 30 s."""

WRAPPED_ERRORS = ("cause", "controller_failure", "health_check_failure")
"""The attributes in which Ray's exceptions keep the error that they wrap."""

CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")
"""What `ray up` gives its autoscaler, on the head node, where the drivers of jobs run."""


def checkpoint_list(metrics: Mapping[str, Mapping[str, Any]], train: TrainConfig) -> str:
    """The content of `CHECKPOINT_LIST`; `metrics` are those of each checkpoint by the name of its folder.

    Ray deletes from the front, so the order is its own: by score, worst first, if checkpoints have one, else
    by age, oldest first.
    """
    import ray

    metric, sign = train.best_metric or "step", -1 if train.best_metric and not train.best_is_greatest else 1
    names = sorted(metrics, key=lambda name: (sign * metrics[name][metric], metrics[name]["step"], name))
    by_step = sorted(metrics, key=lambda name: (metrics[name]["step"], name))
    results = {name: {"checkpoint_dir_name": name, "metrics": metrics[name]} for name in names}
    return json.dumps(
        {
            "ray_version": ray.__version__,
            "checkpoint_results": list(results.values()),
            "checkpoint_report_indices": [by_step.index(name) for name in names],
            "latest_checkpoint_result": results[by_step[-1]],
            "current_report_index": len(names),
            "pending_training_results": [],
            "pending_validation_specs": [],
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }
    )


def pack_working_dir(folder: Path, package: Path) -> None:
    """Write the ZIP file that `ray job submit --working-dir` would upload, with what Ray leaves out of it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    left_out = get_runtime_env_default_excludes()  # .git and environments
    quiet = logging.getLogger("bdpo.upload")
    quiet.setLevel(logging.ERROR)
    create_package(str(folder), package, include_gitignore=True, excludes=left_out, logger=quiet)


def user_error_in(error: Exception) -> UserError | None:
    """What an actor of Ray Data raised for the user: Ray Data brings back only the text of its traceback."""
    names = f"{UserError.__name__}|{StorageUnavailable.__name__}"
    raised = re.search(rf"^{UserError.__module__}\.(?:{names}): (.*)$", str(error), re.MULTILINE)
    return UserError(raised[1]) if raised else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The errors that Ray's exceptions wrap; of a group of workers the error of each."""
    wrapped = [getattr(error, name, None) for name in WRAPPED_ERRORS]
    wrapped += getattr(error, "worker_failures", {}).values()
    inside = [each for each in wrapped if isinstance(each, BaseException)]
    if not inside:
        yield error
    for each in inside:
        yield from causes(each)


def error_of_trial(trial: Any) -> BaseException | None:
    """The error that the actor of one of Tune's trials raised last; None if its process died."""
    from ray import cloudpickle

    file = trial.pickled_error_file
    error: BaseException | None = cloudpickle.loads(Path(file).read_bytes()) if file else None
    return error


def keep_secrets() -> None:
    """Have Tune's trials take the keys of object storage from their node's environment, as all else does.

    Ray 2.60 copies the driver's into the `runtime_env` of every trial, which its logs and its API show.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])


def storage_unavailable(error: BaseException) -> StorageUnavailable | None:
    """What object storage did not answer, if that is what Ray's exception wraps."""
    return next((cause for cause in causes(error) if isinstance(cause, StorageUnavailable)), None)


_NODE = re.compile(r"Memory on the node \(IP: ([^,\s]+),[^)]*\).* was ([\d.]+ ?GB(?: used)? / [\d.]+ ?GB)")
_PROCESS = re.compile(r"^\s*(\d+)\t([\d.]+)\t(\S+)", re.MULTILINE)


def full_node_line(error: BaseException) -> str | None:
    """What filled the memory of a node, if Ray ended processes there for that reason; else None.

    Of the processes that Ray lists the three largest are named, without the arguments of their commands.
    """
    text = "\n".join(map(str, causes(error)))
    node = _NODE.search(text)
    if node is None and "running low on memory" not in text:
        return None
    where = f"the memory of node {node[1]} was full ({node[2]})" if node else "the memory of a node was full"
    processes = [f"{gigabytes} GB {Path(command).name}" for _, gigabytes, command in _PROCESS.findall(text)]
    return ": ".join([where, *([", ".join(processes[:3])] if processes else [])])
