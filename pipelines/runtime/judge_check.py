"""Whether the judge of a run can judge, before anything is done: a local model shows it on a worker."""

from __future__ import annotations

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.evaluation.judges.registry import is_checked, judge_kind, make_judge
from bdpo.storage.run_dir import RunDir
from pipelines.runtime.cluster import connect, require_capacity
from pipelines.runtime.ray_internals import user_error_in

CHECK_SECONDS = 1800.0
"""The wait for a worker of `evaluate`: a node is started, a model is downloaded."""


def check_judge(config: Config, run: RunDir) -> str:
    """What the judge requires is there, and a local model judges the known answers rightly.

    On a cluster with GPUs it is loaded on a worker, where it will run; without GPUs here.

    Raises:
        UserError: it cannot judge.
    """
    from bdpo.cluster import preflight

    found, kind = preflight.check_judge_requirements(config, run), judge_kind(config)
    if not (kind.has_model and is_checked(config)):
        return found
    if config.evaluate.gpus_per_worker:
        _make_on_a_worker(config)
    else:
        make_judge(config)
    return f"{found}, known answers are told apart"


def _make_on_a_worker(config: Config) -> None:
    connect()
    import ray

    gpus = config.evaluate.gpus_per_worker
    require_capacity("evaluate", 1, gpus)
    task = ray.remote(num_cpus=1, num_gpus=gpus)(_make)
    try:
        ray.get(task.remote(config), timeout=CHECK_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise UserError(
            f"no worker has loaded the judge within {CHECK_SECONDS / 60:.0f} minutes; is one free?"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise user_error_in(error) or error from None


def _make(config: Config) -> None:
    make_judge(config)  # which stays there: a model is nothing to send
