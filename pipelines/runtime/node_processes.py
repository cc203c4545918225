"""Processes on the nodes of the cluster: whether a worker's is still there, and its end.

A stopped process answers no request, so a task on its node is what looks at it, or kills it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pipelines.runtime.work_times import Worker

ANSWER_SECONDS = 30.0
"""How long a call of Ray's may take where workers are watched: work never waits longer for its watch."""


def has_ended(worker: Worker) -> bool:
    """Whether the process of a worker has ended, or its node has; False if the node does not answer."""
    return not _on_its_node(worker, is_there, unanswered=True)


def kill(worker: Worker) -> bool:
    """Kill a process on its node, whatever it does; False if it has ended, or its node has."""
    return _on_its_node(worker, end_process, unanswered=False)


def _on_its_node(worker: Worker, call: Callable[[int, float], bool], unanswered: bool) -> bool:
    """What `call(pid, began)` returns on the node of a worker; False if the node has ended.

    `unanswered` is returned if the node makes no such task within the limit.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    task = _remote(call).options(scheduling_strategy=there)
    try:
        return bool(ray.get(task.remote(worker.pid, worker.began), timeout=ANSWER_SECONDS))
    except ray.exceptions.GetTimeoutError:
        return unanswered
    except ray.exceptions.RayError:
        return False


@functools.cache
def _remote(call: Callable[[int, float], bool]) -> Any:
    """The call as a task; Ray keeps every one that is made, so it is made once."""
    import ray

    return ray.remote(num_cpus=0, max_retries=0)(call)


def is_there(pid: int, began: float) -> bool:
    """Whether the process of this machine that has the pid and began then has not ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return bool(process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_process(pid: int, began: float) -> bool:
    """Send SIGKILL to the process of this machine that has the pid and began then; False if it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.create_time() != began:
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True
