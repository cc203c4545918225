"""Kill scoring with SIGKILL at seeded points, and see what is left when it has been run again.

    python -m tests.system.kill_scoring --kills 30 --seed 0

Three kinds in turn: the driver, an actor, and a node of a cluster of two (`ray.cluster_utils.Cluster`).
All are real processes; the pairs and the model are the sandbox's. After each kill the run must end with
every row once and with scores that are bit for bit those of a run that nobody disturbed. A driver is
started again by hand, as a user would; actors and nodes are Ray's to replace. A kill that came too
late, when what it was meant for had ended or all was scored, does not count: it is tried again at an earlier
point, and how often that was so is said. Exit code 1 if a kill did harm.

    rows lost, rows duplicated   against the prepared pairs, in what the shard files hold
    shards rescored              shards that were begun more often than once: those in flight at the kill
    shards rewritten             shards that were committed before the kill and did not stay as they were
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bdpo.config import load_config
from bdpo.data.pairs import count_pairs
from bdpo.sandbox import with_sandbox_files
from bdpo.scoring import shard_scorer
from bdpo.scoring.scores import SCORE_SCHEMA, score_fingerprint, score_store
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.storage.run_dir import RunDir
from pipelines import score
from pipelines.prepare import Prepare
from tests.support import ROOT

CONFIG = ROOT / "pipelines" / "configs" / "sandbox.yaml"

WORKERS = 2

PATIENCE = 600  # seconds for what takes a few on a quiet machine


class NotingScorer(ShardScorer):
    """Notes which process begins to score which shard, in `begun` beside the run folder."""

    def _commit(self, first: int, pairs: pa.Table) -> dict[int, str]:
        with (self.run.root.parent / "begun").open("a") as begun:
            begun.write(f"{first} {os.getpid()}\n")
        return super()._commit(first, pairs)


@dataclass
class Damage:
    """What a kill led to."""

    recovered: int = 0
    rows_lost: int = 0
    rows_duplicated: int = 0
    scores_changed: int = 0
    shards_rescored: int = 0
    shards_rewritten: int = 0

    def __iadd__(self, other: Damage) -> Damage:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def __str__(self) -> str:
        return ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(self, field.name)}" for field in fields(self)
        )

    @property
    def harmless(self) -> bool:
        """At most the shards in flight were scored again."""
        spoilt = self.rows_lost + self.rows_duplicated + self.scores_changed + self.shards_rewritten
        return bool(self.recovered) and not spoilt and self.shards_rescored <= WORKERS


class Scoring:
    """A scoring command on a folder of its own."""

    def __init__(self, folder: Path, address: str = "local") -> None:
        self.folder, self.scores = folder, folder / "run" / "scores"
        self.overrides = [f"run_dir={folder}/run", "score.shard_rows=16", f"score.workers=[1, {WORKERS}]"]
        self.environment = os.environ | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        folder.mkdir()

    def start(self) -> subprocess.Popen[bytes]:
        """The driver, with its output in `log`."""
        command = [sys.executable, "-m", "tests.system.kill_scoring", "--score", "--config", str(CONFIG)]
        command += self.overrides
        with (self.folder / "log").open("a") as log:
            self.driver = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        return self.driver

    def undisturbed(self) -> None:
        """Score all in this process, shard after shard, without Ray."""
        config = with_sandbox_files(load_config(CONFIG, self.overrides))
        run = RunDir(config.run_dir)
        run.open(config).release()
        Prepare(config, run).complete()
        fingerprint = score_fingerprint(config, run)
        scorer = ShardScorer(config, run, fingerprint, "cpu")
        shards = score_store(run, fingerprint).missing(count_pairs(run.pairs), config.score.shard_rows)
        for first, rows in shards:
            scorer({"first": first, "rows": rows})

    def begun(self) -> list[tuple[int, int]]:
        """(first row, process) of every attempt at a shard so far."""
        file = self.folder / "begun"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(int(first), int(process)) for first, process in map(str.split, lines)]

    def start_until_begun(self, shards: int) -> subprocess.Popen[bytes]:
        """A driver that has begun so many shards, or has ended; one without Ray is started again."""
        ends = time.monotonic() + PATIENCE
        driver = self.start()
        while len(self.begun()) < shards and time.monotonic() < ends:
            if driver.poll() is not None:
                if self.begun() or driver.returncode == 0:
                    break
                driver = self.start()
            time.sleep(0.002)
        return driver

    def complete(self) -> bool:
        """Whether all is scored."""
        return (self.scores / "manifest.json").is_file()

    def committed(self) -> dict[str, int]:
        """File name -> time of writing of every shard."""
        return {file.name: file.stat().st_mtime_ns for file in self.scores.glob("part-*")}

    def table(self) -> pa.Table:
        """What the shard files hold, read without any code of ours."""
        shards = sorted(self.scores.glob("part-*"))
        tables = [pq.read_table(file).replace_schema_metadata(None) for file in shards]
        return pa.concat_tables(tables) if tables else SCORE_SCHEMA.empty_table()


class TooLate(Exception):
    """There was nothing to kill any more, or nothing left to do."""


def kill_driver(scoring: Scoring, rng: random.Random, latest: int) -> dict[str, int]:
    """Kill the driver, and with it its local cluster; returns what was committed then."""
    driver = scoring.start_until_begun(rng.randrange(latest))
    time.sleep(rng.uniform(0, 0.2))
    driver.kill()
    driver.wait()
    orphans = [process for _, process in scoring.begun()]
    ends = time.monotonic() + PATIENCE
    while any(map(alive, orphans)) and time.monotonic() < ends:  # Ray ends them; none may write any more
        time.sleep(0.05)
    if driver.returncode != -signal.SIGKILL or scoring.complete():
        raise TooLate
    before = scoring.committed()
    finish(scoring.start_until_begun(len(scoring.begun()) + 1))
    return before


def kill_actor(scoring: Scoring, rng: random.Random, latest: int) -> dict[str, int]:
    """Kill the actor that began a shard last, of those that have not ended by themselves."""
    driver = scoring.start_until_begun(rng.randrange(1, latest))
    time.sleep(rng.uniform(0, 0.1))
    before = scoring.committed()
    for _, actor in reversed(scoring.begun()):
        if alive(actor):
            with suppress(ProcessLookupError):
                os.kill(actor, signal.SIGKILL)
                break
    else:
        raise TooLate
    if scoring.complete():
        raise TooLate
    finish(driver)
    return before


def kill_node(
    scoring: Scoring, rng: random.Random, latest: int, cluster: Any, nodes: list[Any]
) -> dict[str, int]:
    """Kill the node of the actor that began a shard last, and put another in its place."""
    driver = scoring.start_until_begun(rng.randrange(1, latest))
    time.sleep(rng.uniform(0, 0.1))
    before = scoring.committed()
    try:
        raylet = psutil.Process(scoring.begun()[-1][1]).ppid()
    except (IndexError, psutil.NoSuchProcess):
        raise TooLate from None
    (node,) = (node for node in nodes if raylet == node.all_processes["raylet"][0].process.pid)
    nodes.remove(node)
    cluster.remove_node(node, allow_graceful=False)
    late = scoring.complete()
    nodes.append(cluster.add_node(num_cpus=1))
    if late:
        raise TooLate
    finish(driver)
    return before


def finish(driver: subprocess.Popen[bytes]) -> None:
    """Wait for a driver; the harm, if any, is found in what it leaves."""
    driver.wait(timeout=PATIENCE)


def alive(process: int) -> bool:
    """Whether a process still runs."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def damage(scoring: Scoring, reference: Scoring, before: dict[str, int]) -> Damage:
    """Compare what a killed run left with the undisturbed one."""
    expected, found = reference.table(), scoring.table()
    wanted, rows = Counter(expected["pair_id"].to_pylist()), Counter(found["pair_id"].to_pylist())
    after = scoring.committed()
    attempts = Counter(first for first, _ in scoring.begun())
    return Damage(
        recovered=int(scoring.complete()),
        rows_lost=(wanted - rows).total(),
        rows_duplicated=(rows - wanted).total(),
        scores_changed=int(found.num_rows == expected.num_rows and not found.equals(expected)),
        shards_rescored=sum(times > 1 for times in attempts.values()),
        shards_rewritten=sum(after.get(name) != written for name, written in before.items()),
    )


@contextmanager
def two_nodes(folder: str) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster whose head has no CPU: its driver needs none, its actors live on two other nodes.

    A Cluster announces itself to every `ray.init()` on the machine; in a folder of its own it does not.
    """
    os.environ["RAY_TMPDIR"] = folder
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(WORKERS)]
    finally:
        cluster.shutdown()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.update(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), RAY_USAGE_STATS_ENABLED="0"
    )
    total, harmed, repeated = Damage(), 0, 0
    with tempfile.TemporaryDirectory(prefix="kill-scoring-") as folder, two_nodes(folder) as (cluster, nodes):
        reference = Scoring(Path(folder) / "reference")
        reference.undisturbed()
        shards = len(reference.committed())
        for number in range(arguments.kills):
            kind = ("driver", "actor", "node")[number % 3]
            latest = shards if kind == "driver" else shards - 8  # begun shards: Ray has some more in hand
            for attempt in count():
                rng = random.Random(f"{arguments.seed} {number} {attempt}")
                name = f"{number}.{attempt}"
                scoring = Scoring(Path(folder) / name, cluster.address if kind == "node" else "local")
                try:
                    if kind == "node":
                        before = kill_node(scoring, rng, latest, cluster, nodes)
                    else:
                        before = (kill_driver if kind == "driver" else kill_actor)(scoring, rng, latest)
                    break
                except TooLate:
                    repeated += 1
                    latest = max(2, latest // 2)
                finally:
                    scoring.driver.kill()
                    scoring.driver.wait()
            done = damage(scoring, reference, before)
            print(f"{number:3} {kind:6} killed after {len(before):2} of {shards} shards: {done}", flush=True)
            if not done.harmless:
                harmed += 1
                print((scoring.folder / "log").read_text()[-4000:], flush=True)
            total += done
    print(
        f"{arguments.kills} kills, seed {arguments.seed}: {total}; harmed {harmed}; "
        f"kills that came too late and were repeated earlier {repeated}"
    )
    sys.exit(bool(harmed))


def score_noting() -> None:
    """`python -m pipelines.score` with actors that note what they begin."""
    shard_scorer.ShardScorer = NotingScorer
    score.main()


if __name__ == "__main__":
    if "--score" in sys.argv:
        sys.argv.remove("--score")
        score_noting()
    else:
        main()
