"""The two executors that make the shards of a stage: this process, or a pool of Ray actors under Ray Data.

What flows through Ray is `{first, rows}` alone; the data are read and written by the actors, so nothing is
lost with the driver and the driver's memory does not grow with the data.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from bdpo.config import EvaluateConfig, ScoreConfig, worker_range
from bdpo.config.attack import AttackConfig
from bdpo.errors import UserError
from bdpo.storage.shards import ShardStore
from pipelines.runtime.cluster import connect, require_capacity
from pipelines.runtime.progress import InWork, progress_bar
from pipelines.runtime.ray_internals import user_error_in
from pipelines.runtime.stalls import Watched, watching
from pipelines.runtime.watched_actor import REFUSAL, WatchedActor, part_name, shard_name
from pipelines.runtime.work_times import PAUSED, AtWork, Begins

if TYPE_CHECKING:
    from ray.data import Dataset


# Tries of a shard whose actor dies: if all fail, the shard is the cause and not the machine.
ATTEMPTS = 3

# Restarts of an actor before Ray Data makes another; then how many actors in a row may die while they start.
# With Ray's own defaults, a model that kills every process that loads it would be retried for ever.
RESTARTS, MAX_INIT_DEATHS = 3, 5


Shards: TypeAlias = Sequence[tuple[int, int]]
"""(first row, number of rows) of each."""


@dataclass(frozen=True)
class ShardWork:
    """`total` rows that are to be in `store`, in shards of `shard_rows`; `title` names it on the terminal.

    `actor(**arguments, device=...)` makes an object that is called with `{first, rows}`, and commits a shard.
    """

    title: str
    actor: type
    arguments: dict[str, Any]
    store: ShardStore
    total: int
    shard_rows: int
    at_least: float = 0.0
    """Seconds that a shard may take in any case, by limits of its own as those of an endpoint."""

    def missing(self) -> Shards:
        """The shards that are to be made."""
        return self.store.missing(self.total, self.shard_rows)


class Executor(Protocol):
    """What makes the shards of a stage."""

    def complete_shards(self, work: ShardWork) -> None:
        """Make the shards that are missing."""

    def without_model(self) -> Executor:
        """What makes the shards of work that has no model of its own, and is kept busy from one process."""


@dataclass(frozen=True)
class InProcess:
    """Every shard in this process, on its GPU if it has `gpus`; the GPU's memory is freed afterwards.

    `begins` is called when it begins something, for whoever watches this process.
    """

    gpus: float = 0
    begins: Begins = lambda kind, what, at_least=0.0: None

    def without_model(self) -> Executor:
        """This process, watched as before."""
        return replace(self, gpus=0)

    def complete_shards(self, work: ShardWork) -> None:
        """Make the shards that are missing, one after the other."""
        missing = work.missing()
        if not missing:
            return
        try:
            self._make_shards(work, missing)
        finally:
            self.begins(PAUSED, "its work between shards")
        if self.gpus:
            import torch

            torch.cuda.empty_cache()

    def _make_shards(self, work: ShardWork, missing: Shards) -> None:
        self.begins(f"start of {work.title}", "its start")
        seen = InWork(0, "starting")
        done = work.total - sum(rows for _, rows in missing)
        with progress_bar(work.title, work.total, done, lambda: seen) as advance:
            make_shard = work.actor(**work.arguments, device="cuda" if self.gpus else "cpu")
            for first, rows in missing:

                def progress(of_shard: float, part: str = part_name(first, rows)) -> None:
                    nonlocal seen
                    seen = InWork(of_shard)
                    self.begins(f"part of {work.title}", part, work.at_least)

                self.begins(work.title, shard_name(first, rows), work.at_least)
                make_shard.progress = progress
                make_shard({"first": first, "rows": rows})
                seen = InWork()
                advance(rows)


@dataclass(frozen=True)
class RayPool:
    """`workers` (n or [min, max]) actors of `gpus` each, for the stage whose config section is `stage`.

    An actor that stands still for `stall_seconds` at least is killed and replaced, see `WorkTimes.limit`.
    """

    stage: str
    workers: Any
    gpus: float
    stall_seconds: float

    @classmethod
    def of(cls, stage: str, section: ScoreConfig | EvaluateConfig | AttackConfig) -> RayPool:
        """The pool that a section of the config describes."""
        return cls(stage, section.workers, section.gpus_per_worker, section.stall_seconds)

    def without_model(self) -> Executor:
        """This process, the driver."""
        return InProcess()

    def complete_shards(self, work: ShardWork) -> None:
        """Make the shards that are missing; what is lost with nodes that die is made again, twice at most.

        Raises:
            UserError: the cluster can never hold the smallest such pool; or an actor raised one.
            RayError: more shards failed than nodes that die explain.
        """
        lost = may_be_lost(self.workers)
        for may_fail in (lost, lost, 0):
            missing = work.missing()
            if not missing:
                break
            self.make_shards(work, missing, may_fail)

    def make_shards(
        self,
        work: ShardWork,
        shards: Shards,
        may_fail: int,
        queue: int = 2,
        each: Callable[[dict[str, Any]], None] = lambda shard: None,
    ) -> None:
        """Make these shards, of which `may_fail` may fail; `each` is called with what the actors return.

        Raises:
            UserError: the cluster can never hold the smallest such pool; or an actor raised one.
            RayError: more shards failed.
            NoRoom: the cluster had no room for an actor within the limit.
        """
        dataset = shard_dataset(shards, may_fail)
        with watching(work.title, self.stall_seconds) as watched:
            arguments = {**work.arguments, "actor": work.actor, "watch": watched.watch}
            made = self.map(dataset, WatchedActor, arguments, queue)
            watched.wait(lambda: consume(made, work, shards, each, watched))

    def map(self, dataset: Dataset, actor: type, arguments: dict[str, Any], queue: int = 2) -> Dataset:
        """Run every shard of `shard_dataset` through the actors.

        An actor has `queue` shards at a time, so that it need not wait for the next; with 1, none but the
        shard that it works on is lost with it.

        Raises:
            UserError: the cluster can never hold the smallest such pool.
        """
        from ray.data import ActorPoolStrategy

        low, high = worker_range(self.workers)
        require_capacity(self.stage, low, self.gpus)
        device = "cuda" if self.gpus else "cpu"
        with warnings.catch_warnings(action="ignore"):  # Ray 2.60 has no other way yet to bound the retries
            return dataset.map(
                actor,
                fn_constructor_kwargs={**arguments, "device": device},
                compute=ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=queue),
                num_cpus=1,
                num_gpus=self.gpus or None,
                max_task_retries=ATTEMPTS - 1,
                max_restarts=RESTARTS,
            )


def may_be_lost(workers: Any) -> int:
    """How many shards may be lost with nodes that die, before something else must be what goes wrong."""
    return 4 * worker_range(workers)[1]


def shard_dataset(shards: Shards, may_fail: int = 0) -> Dataset:
    """One block for each (first row, number of rows), so that each is a task of its own.

    When more than `may_fail` of them fail, all fail.
    """
    connect()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error that ends the run is raised as well

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stage shows its own, in rows
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    context.max_errored_blocks = may_fail
    rows = [{"first": first, "rows": rows} for first, rows in shards]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def consume(
    dataset: Dataset,
    work: ShardWork,
    shards: Shards,
    each: Callable[[dict[str, Any]], None],
    watched: Watched,
) -> None:
    """Run it to the end with a progress bar in rows, those that were done before included.

    `each` is called with the row that an actor returns for a shard. Between shards the bar shows what the
    watch has seen.

    Raises:
        UserError: an actor raised one.
    """
    from ray.exceptions import RayError

    done = work.total - sum(rows for _, rows in shards)
    sizes, made = dict(shards), set()
    begun: dict[str, float] = {}  # rows of shards that Ray Data has not returned yet, be they made or not

    def in_work() -> InWork:
        nonlocal begun
        seen = watched.at_work
        begun = {part: rows for part, rows in {**begun, **seen.rows}.items() if part not in made}
        return InWork(sum(begun.values()), _note(seen))

    try:
        with progress_bar(work.title, work.total, done, in_work) as advance:
            for shard in dataset.iter_rows():
                if reason := shard.get(REFUSAL):
                    raise UserError(reason)
                made.add(part_name(shard["first"], sizes[shard["first"]]))
                advance(shard["rows"])
                each(shard)
    except RayError as error:  # of a task, or of an actor that could not be made
        raised = user_error_in(error)
        if raised is None:
            raise
        raise raised from None


def _note(seen: AtWork) -> str:
    """What the workers do as long as not all of them work on shards."""
    if not seen.workers:
        return "starting workers"
    return f"starting {seen.starting} of {seen.workers} workers" if seen.starting else ""
