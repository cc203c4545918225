"""Ray Data over shards: each row is a range of rows, each actor commits the shards that it is given.

What flows through Ray is `{first, rows}` alone; the data are read and written by the actors, so nothing
is lost with the driver and the driver's memory does not grow with the data.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bdpo.config import worker_range
from bdpo.errors import UserError
from pipelines.runtime.cluster import connect, require
from pipelines.runtime.progress import progress_bar

if TYPE_CHECKING:
    from ray.data import Dataset


# Of a shard whose actor dies under it: more often than that it is the shard and not the machine.
ATTEMPTS = 3

# Of an actor, before Ray Data makes another; then how many in a row may die unborn. Ray's own defaults would
# go on for ever with a model that kills every process that loads it.
RESTARTS, STILLBORN = 3, 5


def in_hand(workers: Any) -> int:
    """How many shards may be lost with nodes that die, before it is something else that goes wrong."""
    return 4 * worker_range(workers)[1]


def shard_dataset(shards: Sequence[tuple[int, int]], may_fail: int = 0) -> Dataset:
    """One block for each (first row, number of rows), so that each is a task of its own.

    When more than `may_fail` of them fail, all fail.
    """
    connect()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error that ends the run is raised as well

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stage shows its own, in rows
    context.max_consecutive_actor_init_deaths = STILLBORN
    context.max_errored_blocks = may_fail
    rows = [{"first": first, "rows": rows} for first, rows in shards]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def on_pool(
    dataset: Dataset,
    stage: str,
    actor: type,
    arguments: dict[str, Any],
    workers: Any,
    gpus: float,
    queue: int = 2,
) -> Dataset:
    """Run every shard through a pool of `workers` (n or [min, max]) actors of `gpus` each.

    An actor has `queue` shards at a time, so that it need not wait for the next; with 1, none but the
    shard that it works on is lost with it.

    Raises:
        UserError: the cluster can never hold the smallest such pool.
    """
    from ray.data import ActorPoolStrategy

    low, high = worker_range(workers)
    require(stage, low, gpus)
    device = "cuda" if gpus else "cpu"
    with warnings.catch_warnings(action="ignore"):  # Ray 2.60 has no other way yet to bound the retries
        return dataset.map(
            actor,
            fn_constructor_kwargs={**arguments, "device": device},
            compute=ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=queue),
            num_cpus=1,
            num_gpus=gpus or None,
            max_task_retries=ATTEMPTS - 1,
            max_restarts=RESTARTS,
        )


def run_here(
    actor: type,
    arguments: dict[str, Any],
    gpus: float,
    title: str,
    total: int,
    missing: Sequence[tuple[int, int]],
) -> None:
    """The same without a pool: every shard in this process, and the GPU's memory is given back."""
    work = actor(**arguments, device="cuda" if gpus else "cpu")
    with progress_bar(title, total, total - sum(rows for _, rows in missing)) as advance:
        for first, rows in missing:
            work({"first": first, "rows": rows})
            advance(rows)
    if gpus:
        import torch

        del work
        torch.cuda.empty_cache()


def consume(
    dataset: Dataset,
    title: str,
    total: int,
    missing: Sequence[tuple[int, int]],
    each: Callable[[dict[str, Any]], None] = lambda shard: None,
) -> None:
    """Run it to the end with a progress bar in rows, those that were done before included.

    `each` is called with what the actors say of every shard.

    Raises:
        UserError: an actor raised one; of its exception Ray Data brings back only the traceback's text.
    """
    from ray.exceptions import RayError

    done = total - sum(rows for _, rows in missing)
    try:
        with progress_bar(title, total, done) as advance:
            for shard in dataset.iter_rows():
                advance(shard["rows"])
                each(shard)
    except RayError as error:  # of a task, or of an actor that could not be made
        raised = re.search(r"^bdpo\.errors\.UserError: (.*)$", str(error), re.MULTILINE)
        if raised is None:
            raise
        raise UserError(raised[1]) from None
