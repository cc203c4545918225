"""Ray Data over shards: each row is a range of rows, each actor commits the shards that it is given.

What flows through Ray is `{first, rows}` alone; the data are read and written by the actors, so nothing
is lost with the driver and the driver's memory does not grow with the data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdpo.config import worker_range
from bdpo.errors import UserError
from pipelines.cli import connect, progress_bar, require

if TYPE_CHECKING:
    from ray.data import Dataset


def shard_dataset(shards: Sequence[tuple[int, int]]) -> Dataset:
    """One block for each (first row, number of rows), so that each is a task of its own."""
    connect()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stage shows its own, in rows
    context.max_consecutive_actor_init_deaths = 5
    rows = [{"first": first, "rows": rows} for first, rows in shards]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def on_pool(
    dataset: Dataset, stage: str, actor: type, arguments: dict[str, Any], workers: Any, gpus: float
) -> Dataset:
    """Run every shard through a pool of `workers` (n or [min, max]) actors of `gpus` each.

    Raises:
        UserError: the cluster can never hold the smallest such pool.
    """
    from ray.data import ActorPoolStrategy

    low, high = worker_range(workers)
    require(stage, low, gpus)
    device = "cuda" if gpus else "cpu"
    return dataset.map(
        actor,
        fn_constructor_kwargs={**arguments, "device": device},
        compute=ActorPoolStrategy(min_size=low, max_size=high),
        num_cpus=1,
        num_gpus=gpus or None,
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


def consume(dataset: Dataset, title: str, total: int, missing: Sequence[tuple[int, int]]) -> None:
    """Run it to the end with a progress bar in rows, those that were done before included.

    Raises:
        UserError: an actor raised one; of its exception Ray Data brings back only the traceback's text.
    """
    from ray.exceptions import RayTaskError

    done = total - sum(rows for _, rows in missing)
    try:
        with progress_bar(title, total, done) as advance:
            for shard in dataset.iter_rows():
                advance(shard["rows"])
    except RayTaskError as error:
        raised = re.search(r"^bdpo\.errors\.UserError: (.*)$", str(error), re.MULTILINE)
        if raised is None:
            raise
        raise UserError(raised[1]) from None
