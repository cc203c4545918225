"""Workers that stand still: noticed within a limit, named in one line, killed, and replaced by Ray.

Ray notices a process that ends. It does not notice one that exists and does nothing: a stopped process, a
CUDA call that never returns, a lock that nobody releases. So each worker reports what it begins to a `Watch`,
an actor beside the driver, and the driver looks for work that takes too long. A killed worker is one more
process that ended: Ray starts another, which makes the lost work again.

How long work may take grows with what such work took so far (`WorkTimes.limit`). A worker that was only slow
and was killed raises the limit as well, so that its successor has three times as long.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pipelines.runtime.progress import console

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    WatchHandle: TypeAlias = "ActorHandle[Watch]"

SLOWER = 3
"""How many times as long as the slowest so far a piece of work may take."""

UNKNOWN = 10
"""How many times the shortest limit a piece of work may take before the first of its kind has ended."""

IDLE = ""
"""The kind of work of a worker that waits for work."""

PAUSED = "waiting for a decision"
"""The kind of work of a worker that may wait as long as it likes."""

ANSWER_SECONDS = 30.0
"""How long a call of Ray's may take here: work never waits longer for its watch."""


@dataclass(frozen=True)
class Worker:
    """A process that works, wherever it runs. `began` is its start time, as pids are used again."""

    node: str
    host: str
    pid: int
    began: float

    @classmethod
    def here(cls) -> Worker:
        """This process."""
        import psutil
        import ray

        node = ray.get_runtime_context().get_node_id()
        return cls(node, socket.gethostname(), os.getpid(), psutil.Process().create_time())


@dataclass(frozen=True)
class Work:
    """What a worker does since the moment `since` (seconds); how long it may take depends on its kind."""

    kind: str
    what: str
    since: float


@dataclass(frozen=True)
class Stall:
    """A worker whose work has taken `seconds`, more than its limit; `slowest` is None if it is the first."""

    worker: Worker
    what: str
    seconds: float
    limit: float
    slowest: float | None

    def line(self) -> str:
        """The line that the user sees."""
        so_far = "the first of its kind" if self.slowest is None else f"slowest so far {self.slowest:.2g} s"
        return (
            f"worker {self.worker.pid} on {self.worker.host} stands still: {self.what} has taken "
            f"{self.seconds:.3g} s (limit {self.limit:.3g} s, {so_far})"
        )


class WorkTimes:
    """What every worker does, and how long work of each kind took; `shortest` (seconds) is the least limit.

    The caller gives the time, so that all times are of one clock.
    """

    def __init__(self, shortest: float) -> None:
        self.shortest = shortest
        self.doing: dict[Worker, Work] = {}
        self.slowest: dict[str, float] = {}

    def begin(self, worker: Worker, kind: str, what: str, now: float) -> None:
        """The worker has ended what it did before, and begins this."""
        self._took(worker, now)
        self.doing[worker] = Work(kind, what, now)

    def forget(self, worker: Worker, now: float, stalled: bool) -> None:
        """The worker is gone. If it was killed because it stalled, its work took that long at least."""
        if stalled:
            self._took(worker, now)
        self.doing.pop(worker, None)

    def limit(self, kind: str) -> float:
        """Seconds that work of a kind may take; a worker may wait for work as long as any work may take."""
        slowest = max(self.slowest.values(), default=None) if kind == IDLE else self.slowest.get(kind)
        return self.shortest * UNKNOWN if slowest is None else max(self.shortest, SLOWER * slowest)

    def stalled(self, now: float) -> list[Stall]:
        """The workers that stand still, the first that began first.

        A worker that waits for work is one of them only if all do: then one was given work and did not begin.
        """
        all_wait = all(work.kind == IDLE for work in self.doing.values())
        found = []
        for worker, work in sorted(self.doing.items(), key=lambda item: item[1].since):
            may_wait = work.kind == PAUSED or (work.kind == IDLE and not all_wait)
            seconds, limit = now - work.since, self.limit(work.kind)
            if seconds > limit and not may_wait:
                found.append(Stall(worker, work.what, seconds, limit, self.slowest.get(work.kind)))
        return found

    def _took(self, worker: Worker, now: float) -> None:
        work = self.doing.get(worker)
        if work is not None and work.kind not in (IDLE, PAUSED):
            self.slowest[work.kind] = max(now - work.since, self.slowest.get(work.kind, 0.0))


class Watch:
    """An actor to which workers report what they do; the time is that of its own process."""

    def __init__(self, shortest: float) -> None:
        self.times = WorkTimes(shortest)

    def begin(self, worker: Worker, kind: str, what: str) -> None:
        """See `WorkTimes.begin`."""
        self.times.begin(worker, kind, what, time.monotonic())

    def forget(self, worker: Worker, stalled: bool) -> None:
        """See `WorkTimes.forget`."""
        self.times.forget(worker, time.monotonic(), stalled)

    def stalled(self) -> list[Stall]:
        """See `WorkTimes.stalled`."""
        return self.times.stalled(time.monotonic())

    def workers(self) -> list[Worker]:
        """All workers that have reported and are not gone."""
        return list(self.times.doing)


class Reporter:
    """The connection of this process to its watch. A watch that does not answer stops no work."""

    def __init__(self, watch: WatchHandle) -> None:
        self.watch, self.worker = watch, Worker.here()

    def begin(self, kind: str, what: str) -> None:
        """Report what this process begins, and do not wait: what it did before is watched until then."""
        self.watch.begin.remote(self.worker, kind, what)

    def begin_and_wait(self, kind: str, what: str) -> None:
        """The same, after which it is certain that the work is watched: waiting for work is not."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(self.watch.begin.remote(self.worker, kind, what), timeout=ANSWER_SECONDS)


class WatchedActor:
    """An actor of a pool, `actor(**arguments)`, that reports its start and every shard to its watch."""

    def __init__(self, actor: type, watch: WatchHandle, **arguments: Any) -> None:
        self.reporter = Reporter(watch)
        self.reporter.begin_and_wait("start", "its start")
        self.actor = actor(**arguments)
        self.reporter.begin(IDLE, "its wait for work")

    def __call__(self, shard: Any) -> Any:
        """What the actor makes of the shard."""
        first, rows = int(shard["first"]), int(shard["rows"])
        self.reporter.begin_and_wait("shard", f"the shard of rows {first} to {first + rows - 1}")
        try:
            return self.actor(shard)
        finally:
            self.reporter.begin(IDLE, "its wait for work")


@contextmanager
def watching(title: str, shortest: float, together: bool = False) -> Iterator[WatchHandle]:
    """Kill workers that stand still while the block runs; yields the watch to which they report.

    `shortest` is the least limit in seconds. Workers that work `together` are all killed when one of them
    stands still: the others wait for it, and cannot be told from it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    watch: Any = ray.remote(num_cpus=0)(Watch).options(scheduling_strategy=here).remote(shortest)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(min(5.0, shortest / 10)):
            with suppress(ray.exceptions.RayError):  # of the watch; without it nothing is noticed, or harmed
                _end_stalled(title, watch, together)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield watch
    finally:
        ended.set()
        ray.kill(watch)


def _end_stalled(title: str, watch: WatchHandle, together: bool) -> None:
    """Kill the workers that stand still, with a line each; workers that work together all, with one line."""
    import ray

    stalls: list[Stall] = ray.get(watch.stalled.remote(), timeout=ANSWER_SECONDS)
    for stall in stalls:
        killed = _kill(stall.worker)
        watch.forget.remote(stall.worker, killed)
        if killed and together:
            for worker in ray.get(watch.workers.remote(), timeout=ANSWER_SECONDS):
                watch.forget.remote(worker, _kill(worker))
        if killed:  # else it had ended, and Ray knows: it has replaced the whole group meanwhile
            then = "the training is started again" if together else "its work is done again"
            console.print(f"[bold]{title}[/]  {stall.line()}; killed, {then}", soft_wrap=True)
        if killed and together:
            return  # the other stalls were those of workers that waited for this one


def _kill(worker: Worker) -> bool:
    """Kill a process on its node, whatever it does; False if it has ended, or its node has.

    A stopped process answers no request, so the signal comes from a task on its node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(end_process).options(scheduling_strategy=there)
    try:
        return bool(ray.get(task.remote(worker.pid, worker.began), timeout=ANSWER_SECONDS))
    except ray.exceptions.RayError:
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
