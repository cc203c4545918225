"""Workers that stand still, or never begin: noticed within a limit, and named in one line.

Ray notices a process that ends. It does not notice one that exists and does nothing: a stopped process, a
CUDA call that never returns, a lock that nobody releases. So each worker reports what it begins to a `Watch`,
an actor beside the driver, and the driver looks for work that takes too long (`WorkTimes`). A killed worker
is one more process that ended: Ray starts another, which makes the lost work again.

While no worker is at work at all, the work waits for room on the cluster: for a node that comes, or for
others to end. That wait has a limit as well, after which the command ends (`NoRoom`).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from pipelines.runtime.node_processes import ANSWER_SECONDS, has_ended, kill
from pipelines.runtime.progress import console
from pipelines.runtime.signals import in_thread
from pipelines.runtime.work_times import (
    ROOM_SECONDS,
    START,
    AtWork,
    RoomWait,
    Stall,
    Worker,
    WorkTimes,
)

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

    WatchHandle: TypeAlias = "ActorHandle[Watch]"

T = TypeVar("T")

SIGN_SECONDS = 1.0
"""A worker that does the same again reports it no more often."""


class NoRoom(Exception):
    """No worker could begin within the limit; the message is one line. A later try may find room."""


class Watch:
    """An actor to which workers report what they do; the time is that of its own process."""

    def __init__(self, shortest: float, room: float) -> None:
        self.times = WorkTimes(shortest, room, time.monotonic())
        self.placement_groups: list[PlacementGroup] = []

    def begin(self, worker: Worker, kind: str, what: str, at_least: float = 0.0, rows: float = 0.0) -> None:
        """See `WorkTimes.begin`."""
        self.times.begin(worker, kind, what, time.monotonic(), at_least, rows)

    def forget(self, worker: Worker, stalled: bool) -> None:
        """See `WorkTimes.forget`."""
        self.times.forget(worker, time.monotonic(), stalled)

    def stalled(self) -> list[Stall]:
        """See `WorkTimes.stalled`."""
        return self.times.stalled(time.monotonic())

    def room_wait(self) -> RoomWait:
        """See `WorkTimes.room_wait`."""
        return self.times.room_wait(time.monotonic())

    def at_work(self) -> AtWork:
        """See `WorkTimes.at_work`."""
        return self.times.at_work()

    def workers(self) -> list[Worker]:
        """All workers that have reported and are not gone."""
        return list(self.times.doing)

    def paused(self) -> list[Worker]:
        """See `WorkTimes.paused`."""
        return self.times.paused()

    def hold(self, group: PlacementGroup) -> None:
        """A worker runs in this placement group."""
        if group not in self.placement_groups:
            self.placement_groups.append(group)

    def held(self) -> list[PlacementGroup]:
        """All placement groups in which workers ran."""
        return self.placement_groups


class Reporter:
    """The connection of a process to its watch. A watch that does not answer stops no work.

    It may be made in one process and used in another, which is the one that is watched.
    """

    def __init__(self, watch: WatchHandle) -> None:
        self.watch = watch
        self.begun, self.since = ("", ""), 0.0

    @functools.cached_property
    def worker(self) -> Worker:
        """The process that reports."""
        return Worker.here()

    def begin(self, kind: str, what: str, at_least: float = 0.0, rows: float = 0.0) -> None:
        """Report what this process begins, and do not wait: what it did before is watched until then.

        What it does many times a second is reported once a second.
        """
        now = time.monotonic()
        if (kind, what) != self.begun or now - self.since >= SIGN_SECONDS:
            self.begun, self.since = (kind, what), now
            self.watch.begin.remote(self.worker, kind, what, at_least, rows)

    def begin_and_wait(self, kind: str, what: str) -> None:
        """The same, after which it is certain that the work is watched: waiting for work is not."""
        import ray

        self.begun = ("", "")
        with suppress(ray.exceptions.RayError):
            ray.get(self.watch.begin.remote(self.worker, kind, what), timeout=ANSWER_SECONDS)

    def hold_placement_group(self) -> None:
        """Report the placement group of this process, see `Watched.release`."""
        from ray.util import get_current_placement_group

        self.watch.hold.remote(get_current_placement_group())

    def leave(self) -> None:
        """Report that this process has ended its work, and is not to be watched any more."""
        self.watch.forget.remote(self.worker, False)


@dataclass
class Watched:
    """Work that is watched: where its workers report, and when it is given up as the cluster has no room."""

    watch: WatchHandle
    given_up: Future[NoReturn]
    at_work: AtWork = field(default_factory=AtWork)
    """What the last look has seen."""

    def wait(self, call: Callable[[], T]) -> T:
        """Call what waits for the workers, in a thread of its own.

        Raises:
            NoRoom: no worker has begun within the limit; the call is left behind.
        """
        return in_thread(call, self.given_up)

    def release(self) -> None:
        """Give back the room of a training whose controller died, in which the next one is to run.

        Ray Train has an actor of its own for that. It asks the dashboard whether the controller is alive, so
        where there is no dashboard it gives nothing back.
        """
        import ray
        from ray.util import remove_placement_group

        groups: list[PlacementGroup] = ray.get(self.watch.held.remote(), timeout=ANSWER_SECONDS)
        for group in groups:
            remove_placement_group(group)


@contextmanager
def watching(
    title: str, shortest: float, together: bool = False, room: float = ROOM_SECONDS
) -> Iterator[Watched]:
    """Kill workers that stand still while the block runs; yields the watch to which they report.

    `shortest` is the least limit in seconds, `room` that of a wait for room on the cluster. Workers that work
    `together` are all killed when one of them stands still: the others wait for it, and look the
    same.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    watch: Any = ray.remote(num_cpus=0)(Watch).options(scheduling_strategy=here).remote(shortest, room)
    ended, watched = threading.Event(), Watched(watch, Future())

    def look() -> None:
        named = False  # of one wait for room a line is enough
        checked = time.monotonic()
        while not ended.wait(min(5.0, shortest / 10)):
            with suppress(ray.exceptions.RayError):  # of the watch; without it nothing is noticed, or harmed
                _end_stalled(title, watch, together)
                if time.monotonic() - checked > shortest:
                    _forget_ended(watch)
                    checked = time.monotonic()
                watched.at_work = ray.get(watch.at_work.remote(), timeout=ANSWER_SECONDS)
                wait: RoomWait = ray.get(watch.room_wait.remote(), timeout=ANSWER_SECONDS)
                if wait.seconds > shortest and not named:
                    _name_room_wait(title, wait)
                named = wait.seconds > shortest
                if wait.seconds > wait.limit and not watched.given_up.done():
                    watched.given_up.set_exception(_no_room(title, wait))

    threading.Thread(target=look, daemon=True).start()
    try:
        yield watched
    finally:
        ended.set()
        ray.kill(watch)


def watched_tasks(
    title: str, function: Callable[..., T], calls: Mapping[str, Sequence[Any]], gpus: float, shortest: float
) -> Iterator[tuple[str, T]]:
    """A Ray task, `function(*arguments, begins)`, for each of `calls`; yields their names and results.

    A task calls `begins(kind, what)` whenever it begins something. One that stands still is killed, and Ray
    runs it again, three times at most.

    Raises:
        Exception: what a task raised.
        NoRoom: the cluster has no room for a task.
        RayError: a task was killed, or lost with its node, too often.
    """
    import ray
    from ray.exceptions import RayTaskError

    with watching(title, shortest) as watched:
        task: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_reporting)
        pending = {name: task.remote(function, watched.watch, calls[name]) for name in calls}
        for name, result in pending.items():
            try:
                yield name, watched.wait(functools.partial(_result, result))
            except RayTaskError as error:
                raise error.cause from None


def _result(task: Any) -> Any:
    import ray

    return ray.get(task)


def _reporting(function: Callable[..., T], watch: WatchHandle, arguments: Sequence[Any]) -> T:
    """What a task of `watched_tasks` runs."""
    reporter = Reporter(watch)
    reporter.begin_and_wait(START, "its start")
    try:
        return function(*arguments, reporter.begin)
    finally:
        reporter.leave()


def _name_room_wait(title: str, wait: RoomWait) -> None:
    """The line that the user sees while no worker is at work."""
    console.print(
        f"[bold]{title}[/]  no worker has begun for {wait.seconds:.3g} s: the cluster has no room, or starts "
        f"processes slowly; given up after {wait.limit / 60:.3g} minutes",
        soft_wrap=True,
    )


def _no_room(title: str, wait: RoomWait) -> NoRoom:
    return NoRoom(
        f"{title}: no worker has begun within {wait.limit / 60:.3g} minutes: the cluster has no room for one "
        "(`ray status` shows what is requested and what is free); with fewer or smaller workers, or when "
        "there is room, the same command resumes"
    )


def _end_stalled(title: str, watch: WatchHandle, together: bool) -> None:
    """Kill the workers that stand still, with a line each; workers that work together all, with one line."""
    import ray

    stalls: list[Stall] = ray.get(watch.stalled.remote(), timeout=ANSWER_SECONDS)
    for stall in stalls:
        killed = kill(stall.worker)
        watch.forget.remote(stall.worker, killed)
        if killed and together:
            for worker in ray.get(watch.workers.remote(), timeout=ANSWER_SECONDS):
                watch.forget.remote(worker, kill(worker))
        if killed:  # else it had ended, and Ray knows: it has replaced the whole group meanwhile
            then = "the training is started again" if together else "its work is done again"
            console.print(f"[bold]{title}[/]  {stall.line()}; killed, {then}", soft_wrap=True)
        if killed and together:
            return  # the other stalls were those of workers that waited for this one


def _forget_ended(watch: WatchHandle) -> None:
    """Forget the workers that have ended while they paused: without any other, the work waits for room."""
    import ray

    paused: list[Worker] = ray.get(watch.paused.remote(), timeout=ANSWER_SECONDS)
    for worker in paused:
        if has_ended(worker):
            watch.forget.remote(worker, False)
