"""How far a stage is, read from its run folder alone: nothing is changed, loaded or asked of a cluster."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from bdpo.config import Config
from bdpo.storage.lease import LEASE_SECONDS, RENEWAL_SECONDS, read_holder, shows_life
from bdpo.storage.limits import AT_ONCE
from bdpo.storage.paths import StoragePath, read_bytes, sorted_glob
from bdpo.storage.records import prepared_pairs
from bdpo.storage.run_dir import RunDir

State = Literal["done", "begun", "not begun"]

Fact = str | int | float | bool


@dataclass(frozen=True)
class StageStatus:
    """One stage: its name, its state, and what is known of it: numbers and names, never text of the data."""

    stage: str
    state: State
    facts: dict[str, Fact] = field(default_factory=dict)

    @classmethod
    def of(cls, stage: str, done: bool, begun: bool, **facts: Fact | None) -> StageStatus:
        """The status of a stage; facts that are None are not known, and left out."""
        state: State = "done" if done else "begun" if begun else "not begun"
        return cls(stage, state, {name: fact for name, fact in facts.items() if fact is not None})

    def as_json(self) -> dict[str, Fact]:
        """`stage` and `state` first, then the facts by name."""
        return {"stage": self.stage, "state": self.state, **self.facts}


def count_shards(folder: StoragePath) -> tuple[int, int]:
    """Number of shards in a folder, and of rows in them; a bucket answers many requests at a time."""
    shards = sorted_glob(folder, "part-*.parquet")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return len(shards), sum(pool.map(_rows, shards))


def _rows(shard: StoragePath) -> int:
    try:
        # Of an object all of it, in one request: its size and two ranges of it would be three in a row.
        content = shard if isinstance(shard, Path) else BytesIO(read_bytes(shard))
        return int(pq.read_metadata(content).num_rows)
    except FileNotFoundError:  # another command is at work in the folder: it removed the shard meanwhile
        return 0


def expected_pairs(config: Config, run: RunDir) -> int | None:
    """How many pairs are prepared, or at most will be: drawn, or limited; None if only the data show it."""
    prepared = prepared_pairs(run)
    if prepared is not None:
        return prepared
    return sum(config.data.sample.values()) if config.data.sample else config.data.limit


def command_line(run: RunDir) -> str | None:
    """The command in a run folder: host, pid, since when, and whether it is alive; None if there is none.

    On this host its process is looked at. A command on another host is alive if it shows a sign of life
    within some seconds, for which this function waits.
    """
    holder = read_holder(run.root)
    if holder is None:
        return None
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    last = f"last sign of life {max(0.0, time.time() - holder.alive):.0f} s ago"
    if holder.host != socket.gethostname():
        state = (
            "at work" if shows_life(run.root) else f"no sign of life ({last}); it was killed or is cut off"
        )
    elif not _exists(holder.pid):
        state = f"dead ({last}); the same command resumes"
    elif holder.alive > time.time() + RENEWAL_SECONDS:  # the clock was set back: its times are of no use
        state = "at work" if shows_life(run.root) else "stands still (its last sign of life is in the future)"
    elif time.time() - holder.alive > LEASE_SECONDS:
        state = f"stands still ({last})"
    else:
        state = f"at work ({last})"
    return f"command: pid {holder.pid} on {holder.host} since {since}: {state}"


def _exists(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)
