"""How long pieces of work took, and which take too long: the bookkeeping of `pipelines.runtime.stalls`.

How long work may take grows with what such work took so far (`WorkTimes.limit`). A shard may take as long as
it likes: each part of it, which ends with a sign of life, is work of a kind of its own. A worker that was
only slow and was killed raises the limit as well, so that its successor has three times as long.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

SLOWER = 3
"""How many times as long as the slowest so far a piece of work may take."""

UNKNOWN = 10
"""How many times the shortest limit a piece of work may take before the first of its kind has ended."""

ROOM_SECONDS = 3600.0
"""How long work may at least wait for the first of its workers to begin: a node may have to come."""

START = "start"
"""The kind of work of a worker of a pool until it can be given work."""

IDLE = ""
"""The kind of work of a worker that waits for work."""

PAUSED = "waiting for a decision"
"""The kind of work of a worker that may wait as long as it likes."""


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


class Begins(Protocol):
    """Reports what this process begins to whoever watches it, see `WorkTimes.begin`."""

    def __call__(self, kind: str, what: str, at_least: float = 0.0) -> None:
        """The process has ended what it did before, and begins this."""


@dataclass(frozen=True)
class Work:
    """What a worker does since the moment `since` (seconds); how long it may take depends on its kind.

    Work with limits of its own, as requests have, may take `at_least` seconds whatever such work took so far.
    `rows` of the shard to which the work belongs are done already.
    """

    kind: str
    what: str
    since: float
    at_least: float = 0.0
    rows: float = 0.0


@dataclass(frozen=True)
class AtWork:
    """How many workers there are, how many of them still start, and the rows done of what each works on."""

    workers: int = 0
    starting: int = 0
    rows: Mapping[str, float] = field(default_factory=dict)


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


@dataclass(frozen=True)
class RoomWait:
    """No worker was at work for `seconds`; the work is given up after `limit`."""

    seconds: float
    limit: float


class WorkTimes:
    """What every worker does, and how long work of each kind took; `shortest` (seconds) is the least limit.

    `room` is the least limit of a wait for room, which begins at the time `now` and ends with the first work.
    The caller gives the time, so that all times are of one clock.
    """

    def __init__(self, shortest: float, room: float = ROOM_SECONDS, now: float = 0.0) -> None:
        self.shortest, self.room = shortest, room
        self.doing: dict[Worker, Work] = {}
        self.slowest: dict[str, float] = {}
        self.nobody_since, self.longest_wait = now, 0.0

    def begin(
        self, worker: Worker, kind: str, what: str, now: float, at_least: float = 0.0, rows: float = 0.0
    ) -> None:
        """The worker has ended what it did before, and begins this, see `Work`."""
        if not self.doing:
            self.longest_wait = max(self.longest_wait, now - self.nobody_since)
        self._took(worker, now)
        self.doing[worker] = Work(kind, what, now, at_least, rows)

    def forget(self, worker: Worker, now: float, stalled: bool) -> None:
        """The worker is gone. If it was killed because it stalled, its work took that long at least."""
        if stalled:
            self._took(worker, now)
        if self.doing.pop(worker, None) and not self.doing:
            self.nobody_since = now

    def at_work(self) -> AtWork:
        """What there is to show of the work."""
        starting = sum(work.kind == START for work in self.doing.values())
        rows = {work.what: work.rows for work in self.doing.values() if work.rows}
        return AtWork(len(self.doing), starting, rows)

    def paused(self) -> list[Worker]:
        """The workers that may wait as long as they like: no limit shows that one of them is gone."""
        return [worker for worker, work in self.doing.items() if work.kind == PAUSED]

    def room_wait(self, now: float) -> RoomWait:
        """How long nobody has been at work, and how long that may be: it grows with earlier such waits."""
        seconds = 0.0 if self.doing else now - self.nobody_since
        return RoomWait(seconds, max(self.room, SLOWER * self.longest_wait))

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
            seconds, limit = now - work.since, max(self.limit(work.kind), work.at_least)
            if seconds > limit and not may_wait:
                found.append(Stall(worker, work.what, seconds, limit, self.slowest.get(work.kind)))
        return found

    def _took(self, worker: Worker, now: float) -> None:
        work = self.doing.get(worker)
        if work is not None and work.kind not in (IDLE, PAUSED):
            self.slowest[work.kind] = max(now - work.since, self.slowest.get(work.kind, 0.0))
