"""An actor of a pool that is watched: it reports what it begins, and gives signs of life within a shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdpo.errors import UserError
from pipelines.runtime.stalls import Reporter
from pipelines.runtime.work_times import IDLE, START

if TYPE_CHECKING:
    from pipelines.runtime.stalls import WatchHandle

REFUSAL = "refusal"
"""The key of a shard that was not made under which stands why."""


class WatchedActor:
    """An actor of a pool, `actor(**arguments)`, that reports its start, every shard and its signs of life.

    A `UserError` of the actor, which no other attempt would fix, is returned in place of a shard. Raised, it
    would count as a lost shard or a dead actor: the model would be loaded again for each that may be lost.
    """

    def __init__(self, actor: type, watch: WatchHandle, **arguments: Any) -> None:
        self.reporter = Reporter(watch)
        self.reporter.begin_and_wait(START, "its start")
        self.refusal: str | None = None
        try:
            self.actor = actor(**arguments)
        except UserError as error:
            self.refusal = str(error)
        self.reporter.begin(IDLE, "its wait for work")

    def __call__(self, shard: Any) -> Any:
        """What the actor makes of the shard; `{first, rows, REFUSAL}` where it raises a `UserError`."""
        first, rows = int(shard["first"]), int(shard["rows"])
        if self.refusal is None:
            self.reporter.begin_and_wait("shard", shard_name(first, rows))
            part = part_name(first, rows)
            self.actor.progress = lambda done: self.reporter.begin("part", part, rows=done)
            try:
                return self.actor(shard)
            except UserError as error:
                self.refusal = str(error)
            finally:
                self.reporter.begin(IDLE, "its wait for work")
        return {"first": first, "rows": 0, REFUSAL: self.refusal}


def shard_name(first: int, rows: int) -> str:
    """What a shard is called in the line about a worker."""
    return f"the shard of rows {first} to {first + rows - 1}"


def part_name(first: int, rows: int) -> str:
    """What a part of a shard, between two signs of life, is called there."""
    return f"a part of {shard_name(first, rows)}"
