"""Workers for `benchmarks.scale` whose work takes simulated time and is lost at random.

What is decided is decided by the project's own functions.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from bdpo.config import Config, parse_config
from bdpo.scoring.scores import MAX_UNSCORABLE, SCORE_SCHEMA, TOKEN_COLUMNS, WORK_KEY, score_store
from bdpo.storage.digests import json_digest
from bdpo.storage.manifests import Fingerprint
from bdpo.storage.paths import StoragePath
from bdpo.storage.shards import Shard, ShardStore
from benchmarks.counting_bucket import Bucket
from pipelines.runtime.pool import ATTEMPTS, Shards, may_be_lost
from pipelines.score import Score

Lines = list[str]


@dataclass(frozen=True)
class Size:
    """How large the simulated runs are; `ranks` holds (training ranks, pairs of a step)."""

    pairs: int = 30_000_000
    driven: tuple[int, ...] = (1_000_000, 3_000_000)
    workers: int = 512
    ranks: tuple[tuple[int, int], ...] = (
        (8, 64), (64, 64), (64, 256), (64, 1024), (256, 256), (256, 1024), (256, 4096), (512, 4096),
    )  # fmt: skip
    held_out: tuple[int, ...] = (3_000, 30_000, 300_000)
    nodes: tuple[int, ...] = (1, 8, 32)
    trials: tuple[int, ...] = (50, 200)
    dispatched: int = 4_000


QUICK = Size(20_000, (20_000,), 16, ((2, 8),), (64,), (2,), (4,), 0)


def table(*columns: str) -> Lines:
    """The head of a table."""
    return ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def config_of(**sections: Any) -> Config:
    """A config without model and data, in the bucket."""
    values = {"run_dir": "counted://bucket/run", "model": {"name_or_path": "m"}, "data": {"path": "p"}}
    return parse_config({**values, **sections}, "benchmark")


def pair_ids(rows: int) -> list[str]:
    """Ids as random as those of `prepare`; always the same."""
    return [json_digest(row) for row in range(rows)]


def score_rows(rows: int) -> pa.Table:
    """Scores of so many pairs, the same for each shard of as many; `WORK_KEY` as an actor writes it."""
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        name: rng.normal(100, 40, rows).astype(np.float32) for name in SCORE_SCHEMA.names
    }
    columns |= {name: rng.integers(1, 400, rows) for name in TOKEN_COLUMNS}
    columns |= {"pair_id": pair_ids(rows), "group": ["unsafe"] * rows}
    work = {"worker": "host-1:1", "seconds": 1.0, "tokens": rows, "tokens_forwarded": rows}
    table = pa.table(columns).cast(SCORE_SCHEMA)
    return table.replace_schema_metadata({WORK_KEY: json.dumps(work)})


def link(store: ShardStore, shard: StoragePath, first: int) -> None:
    """The content of a shard as that of the rows from `first` on: nothing in it depends on their number."""
    bucket, digest = shard.fs, shard.name.split("-")[2]  # type: ignore[union-attr]
    bucket.link((store.folder / f"part-{first:09d}-{digest}").path, bucket.content(shard.path))


@dataclass(frozen=True)
class Machines:
    """The workers that score: how fast they are, how often a node of them is lost, how long they start.

    `shard_seconds` is what the driver needs for each shard, whatever the workers do.
    """

    workers: int
    shard_seconds: float
    pairs_per_second: float = 84.0  # 46,000 tokens: a 7B model on an H200 at 65 % of its peak
    hours_between_losses: float = 12.0  # of one node
    start_seconds: float = 90.0
    new_node_seconds: float = 300.0
    node_gpus: int = 8


@dataclass
class SimulatedRun:
    """Seconds of all workers together, by what became of them; `seconds` is what the scoring took."""

    useful: float = 0.0
    lost: float = 0.0
    seconds: float = 0.0
    losses: int = 0
    rounds: int = 0
    failed: int = 0


@dataclass
class SimulatedPool:
    """Takes the place of Ray's pool of actors: nodes are lost at random times, their shards are tried again.

    Ray Data gives a shard that died with its actor to another, `ATTEMPTS` times in all.
    """

    machines: Machines
    outcome: SimulatedRun = field(default_factory=SimulatedRun)
    stop_at: float = float("inf")
    """When the driver is killed."""
    written: dict[int, StoragePath] = field(default_factory=dict)
    """A shard by its number of rows."""

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def make_shards(self, store: ShardStore, shards: Shards, may_fail: int) -> None:
        """Make the shards.

        Raises:
            TimeoutError: the driver was killed.
            RuntimeError: more than `may_fail` shards failed.
        """
        self.outcome.rounds += 1
        work = _Work(self, store, deque(shards))
        work.run()
        if work.failed > may_fail:
            raise RuntimeError(f"{work.failed} shards failed")

    def commit(self, store: ShardStore, first: int, rows: int) -> None:
        """Write a shard; of those with as many rows the first is written, and linked under other names."""
        if rows not in self.written:
            self.written[rows] = store.write(first, score_rows(rows))
        if not store.holds(first, rows):  # as an actor asks before it writes
            link(store, self.written[rows], first)
            Bucket.requests += 1


class _Work:
    """The events of one round; times are seconds since the scoring began."""

    def __init__(self, pool: SimulatedPool, store: ShardStore, pending: deque[tuple[int, int]]) -> None:
        self.pool, self.store, self.pending = pool, store, pending
        self.machines, self.outcome = pool.machines, pool.outcome
        begin = self.outcome.seconds
        self.driver = begin  # when the driver has given out the shards that it was asked for
        self.events: list[tuple[float, str, int, int]] = []
        self.doing: dict[int, tuple[float, int, int]] = {}
        self.idle: set[int] = set()
        self.lives, self.tries, self.failed = Counter[int](), Counter[int](), 0
        for worker in range(self.machines.workers):
            self._later(begin + self.machines.start_seconds, worker)
        for node in range(-(-self.machines.workers // self.machines.node_gpus)):
            self._lose_later(begin, node)

    def run(self) -> None:
        """Until nothing is left to do.

        Raises:
            TimeoutError: the driver was killed.
        """
        while self.pending or self.doing:
            now, kind, who, life = heapq.heappop(self.events)
            self.outcome.seconds = now
            if now > self.pool.stop_at:
                self.pool.stop_at = float("inf")
                self.outcome.lost += sum(now - begun for begun, *_ in self.doing.values())
                raise TimeoutError
            if kind == "lost":
                self._lose(who, now)
            elif life == self.lives[who]:
                self._free(who, now)

    def _free(self, worker: int, now: float) -> None:
        """A worker has ended its shard, or its start, and gets the next."""
        if worker in self.doing:
            begun, first, rows = self.doing.pop(worker)
            self.outcome.useful += now - begun
            self.pool.commit(self.store, first, rows)
        if not self.pending:
            self.idle.add(worker)
            return
        first, rows = self.pending.popleft()
        begin = max(now, self.driver)
        self.driver = begin + self.machines.shard_seconds
        self.doing[worker] = (begin, first, rows)
        spread = max(0.1, self.pool.rng.normal(1, 0.6 / rows**0.5))  # of the lengths of a shard's pairs
        self._later(begin + spread * rows / self.machines.pairs_per_second, worker)

    def _lose(self, node: int, now: float) -> None:
        """A node is gone, and another comes."""
        machines = self.machines
        self.outcome.losses += 1
        for worker in range(
            node * machines.node_gpus, min((node + 1) * machines.node_gpus, machines.workers)
        ):
            self.lives[worker] += 1
            self.idle.discard(worker)
            if worker in self.doing:
                begun, first, rows = self.doing.pop(worker)
                self.outcome.lost += max(0.0, now - begun)
                self._again(first, rows, now)
            self._later(now + machines.new_node_seconds + machines.start_seconds, worker)
        self._lose_later(now + machines.new_node_seconds, node)

    def _again(self, first: int, rows: int, now: float) -> None:
        self.tries[first] += 1
        if self.tries[first] == ATTEMPTS:
            self.failed += 1
            return
        self.pending.append((first, rows))
        if self.idle:
            self._later(now, self.idle.pop())

    def _later(self, when: float, worker: int) -> None:
        heapq.heappush(self.events, (when, "free", worker, self.lives[worker]))

    def _lose_later(self, now: float, node: int) -> None:
        until = self.pool.rng.exponential(3600 * self.machines.hours_between_losses)
        heapq.heappush(self.events, (now + until, "lost", node, 0))


@dataclass(frozen=True)
class SimulatedScore(Score):
    """The stage that scores: its rounds and its shards are the real ones, its actors simulated."""

    pool: SimulatedPool
    pairs: int

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """There are no weights and no texts."""
        return {"simulated": True}

    @cached_property
    def _pairs(self) -> int:
        return self.pairs

    def _say_if_rows_are_plain(self) -> None:
        """There is no model."""

    def _score_shards(self, missing: Shards, reasons: dict[int, str], queue: int) -> None:
        may_fail = MAX_UNSCORABLE + may_be_lost(self.config.score.workers)
        self.pool.make_shards(self.store, missing, may_fail)

    @property
    def store(self) -> ShardStore:
        """The scores in the bucket."""
        return score_store(self.run, self.fingerprint)

    def score(self) -> SimulatedRun:
        """Score all pairs; a driver that is killed is started again."""
        while True:
            try:
                self._score_in_rounds()
            except TimeoutError:
                continue
            return self.pool.outcome


class NoWork:
    """An actor of a pool that does nothing: what is left is what the driver and Ray do for a shard."""

    def __init__(self, device: str) -> None:
        pass

    def __call__(self, shard: Shard) -> Any:
        """As `ShardScorer`."""
        return {**shard, "unscorable": "{}"}


@dataclass(frozen=True)
class Trainers:
    """The nodes of a training: seconds of a step, a checkpoint and a start, and how often a node is lost."""

    nodes: int
    step_seconds: float
    save_seconds: float
    hours_between_losses: float
    start_seconds: float = 300.0


def trained(trainers: Trainers, steps: int, save_steps: int) -> SimulatedRun:
    """A training that loses its steps since the last checkpoint with each node; seconds are of one worker."""
    rng, outcome, saved = np.random.default_rng(0), SimulatedRun(), 0
    mean = 3600 * trainers.hours_between_losses / trainers.nodes
    until = rng.exponential(mean)
    outcome.seconds = trainers.start_seconds
    while saved < steps:
        next_save = min(saved - saved % save_steps + save_steps, steps)
        work = (next_save - saved) * trainers.step_seconds
        if outcome.seconds + work + trainers.save_seconds <= until:
            outcome.seconds += work + trainers.save_seconds
            outcome.useful += work
            saved = next_save
            continue
        outcome.lost += until - outcome.seconds
        outcome.losses += 1
        outcome.seconds = until + trainers.start_seconds
        until = outcome.seconds + rng.exponential(mean)
    return outcome
