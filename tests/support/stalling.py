"""Actors of a pool and tasks that stand still at their first attempt, in one of several ways."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bdpo.errors import UserError
from bdpo.storage.shards import Shard, ShardActor

SHARDS = 6


def stop() -> None:
    """As `kill -STOP` does: no thread of the process runs any more."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """As a call does that never returns: the other threads of the process still answer Ray."""
    threading.Event().wait()


def stop_later() -> None:
    """After the shard, while the actor waits for work or begins the next shard."""
    threading.Timer(0.2, stop).start()


WAYS = {"stop": stop, "hang": hang, "stop_later": stop_later}


def stalls_once(folder: Path, way: str, begins: Callable[[str, str], None]) -> str:
    """A task that reports its work; if there is a `way`, it stands still at its first attempt."""
    begins("forward", "a forward of it")
    time.sleep(0.1)
    begins("forward", "a forward of it")
    once = folder / "stalled"
    if way and not once.exists():
        once.write_text(str(os.getpid()))
        WAYS[way]()
    return "done"


class Stalling:
    """Stands still at shard `at` (-1: in its start), once; `folder` records that, and each finished shard."""

    def __init__(self, folder: Path, way: str, at: int, device: str) -> None:
        self.folder, self.way, self.at = folder, way, at
        self._stall(-1)

    def __call__(self, shard: Shard) -> Shard:
        """The shard, noted in the folder."""
        first = int(shard["first"])
        self._stall(first)
        (self.folder / f"{first}.{os.getpid()}").touch()
        time.sleep(0.1)
        return shard

    def _stall(self, here: int) -> None:
        once = self.folder / "stalled"
        if here == self.at and not once.exists():
            once.write_text(str(os.getpid()))
            WAYS[self.way]()


class Slow(ShardActor):
    """Of three shards of 100 rows the second takes `seconds`, with signs of life; in the third it stops once.

    `folder` gets the pid of each process that begins a shard, and of the one that stops.
    """

    def __init__(self, folder: Path, seconds: float, device: str) -> None:
        self.folder, self.seconds = folder, seconds

    def __call__(self, shard: Shard) -> Shard:
        """The shard, noted in the folder."""
        first, begun = int(shard["first"]), time.monotonic()
        (self.folder / f"{first}.{os.getpid()}").touch()
        self.progress(0)
        while first == 100 and time.monotonic() - begun < self.seconds:
            time.sleep(0.05)
            self.progress(40)
        once = self.folder / "stalled"
        if first == 200 and not once.exists():
            once.write_text(str(os.getpid()))
            stop()
        return shard


class Refusing:
    """Cannot be made, or cannot make a shard, for want of something of the user; notes each attempt."""

    def __init__(self, folder: Path, at_start: bool, device: str) -> None:
        self.notes = folder / "attempts"
        if at_start:
            self._refuse("start ")

    def __call__(self, shard: Shard) -> Shard:
        """Nothing."""
        self._refuse("shard ")
        return shard

    def _refuse(self, what: str) -> None:
        with self.notes.open("a") as notes:
            notes.write(what)
        raise UserError("evaluate.judge.model: no such thing")


@dataclass(frozen=True)
class StallingVariants:
    """Two variants of `pipelines.runtime.variants` without a training, of which the first one stops once."""

    folder: Path

    title = "trials"

    def open_names(self) -> list[str]:
        """Those that are not done."""
        return [name for name in ("first", "second") if not (self.folder / f"{name}.done").exists()]

    def missing(self) -> int:
        """There are no others."""
        return 0

    def next_name(self) -> str:
        """There is no other."""
        raise NotImplementedError

    def runner(self, name: str, begins: Callable[[str, str], None]) -> StallingRunner:
        """What evaluates the variant."""
        return StallingRunner(self.folder, name, begins)

    def is_promoted(self, name: str) -> bool:
        """There is one rung."""
        return True

    def record_failure(self, name: str, failure: object) -> None:
        """Which none should have."""
        (self.folder / f"{name}.failed").write_text(str(failure))

    def table(self) -> str:
        """For the terminal."""
        return ""


@dataclass(frozen=True)
class StallingRunner:
    """A variant in the process that evaluates it."""

    folder: Path
    name: str
    begins: Callable[[str, str], None]

    def next_rung(self) -> bool:
        """Evaluate; at the first attempt the process stops."""
        stalls_once(self.folder, "stop" if self.name == "first" else "", self._begins)
        (self.folder / f"{self.name}.done").touch()
        return True

    def _begins(self, kind: str, what: str) -> None:
        self.begins("answer trained", "the shard of rows 0 to 7")

    def stop_training(self) -> None:
        """There is none."""

    def end(self) -> None:
        """Nothing is left behind."""
