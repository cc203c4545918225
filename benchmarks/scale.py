"""The decisions of a run far beyond this machine: planning, dealing, shards, checkpoints, a sweep, memory.

    OMP_NUM_THREADS=1 python -m benchmarks.scale [driver scoring dealing checkpoints sweep memory] [--quick]

The project's own functions decide. No model is run and no text is read: object storage is in memory and
counts its requests, and what workers do takes simulated time. Each part has a section of its own. With
`--quick` everything is small, nothing is written, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import heapq
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from bdpo.cluster.status import count_shards
from bdpo.config import Config
from bdpo.scoring.scores import SCORE_SCHEMA, finish_scores, finished_scores
from bdpo.search.sweep import Sweep
from bdpo.search.trials import Rung, end_of
from bdpo.stats import Estimate
from bdpo.storage.manifests import write_manifest
from bdpo.storage.paths import parquet_bytes
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import ShardStore
from bdpo.training.batches import plan_without_lengths
from bdpo.variants.ends import End
from bdpo.variants.objective import Measured
from benchmarks.common import apart, peak_memory, write_section
from benchmarks.counting_bucket import LATENCY, Bucket, Counted, counted, new_bucket
from benchmarks.random_pairs import PART_ROWS, random_part
from benchmarks.scale_training import of_checkpoints, of_dealing, of_memory
from benchmarks.simulated import (
    QUICK,
    Lines,
    Machines,
    NoWork,
    SimulatedPool,
    SimulatedScore,
    Size,
    config_of,
    link,
    pair_ids,
    score_rows,
    table,
)


def main() -> None:
    """Measure the parts that are named, or all, and write a section of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], metavar="PART")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, nargs="+", help="for the driver: minutes with 30,000,000")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    size = replace(size, driven=tuple(arguments.pairs)) if arguments.pairs else size
    for name in arguments.parts or PARTS:
        title, measure = PARTS[name]
        rows = measure(size)
        print(f"## {title}", "", *rows, "", sep="\n", flush=True)
        if not arguments.quick:
            write_section(f"Scale: {title}", rows)


def of_driver(size: Size) -> Lines:
    """What the driver does for so many pairs, each size in a process of its own."""
    works = ("what is missing", "status", "check at the end", "read for training", "plan of steps")
    rows = ["**The driver, pairs and scores on object storage:** seconds of a processor / requests in a row."]
    rows += table("pairs", "shard_rows", "shards", *works, "peak, MiB")
    for pairs, shard_rows in [*((pairs, 512) for pairs in size.driven), (size.driven[-1], 4096)]:
        done, peak = apart(driver, pairs, shard_rows)
        cells = [f"{one.seconds:.1f} / {one.in_a_row:,.0f}" for one in done]
        shards = -(-pairs // shard_rows)
        rows.append(f"| {pairs:,} | {shard_rows} | {shards:,} | {' | '.join(cells)} | {peak:,.0f} |")
    return rows


def driver(pairs: int, shard_rows: int) -> tuple[list[Counted], float]:
    """(the driver's works, MiB of their peak beyond what is imported) once all pairs are scored."""
    config = config_of(score={"shard_rows": shard_rows})
    run, store = filled(config, pairs)
    begun, done = peak_memory(), []
    works: list[Callable[[], Any]] = [
        lambda: store.missing(pairs, shard_rows),
        lambda: count_shards(run.scores),
        lambda: finish_scores(run, store.fingerprint, 1.0),
        lambda: finished_scores(run),
        lambda: plan_without_lengths(pairs, config.train, config.seed),
    ]
    for work in works:
        with counted() as found:
            work()
        done.append(found)
    return done, peak_memory() - begun


def filled(config: Config, pairs: int) -> tuple[RunDir, ShardStore]:
    """A run folder in a new bucket with prepared and scored pairs; the ids of each shard are the same."""
    new_bucket()
    run, shard_rows = RunDir(config.run_dir), config.score.shard_rows
    store = SimulatedScore(config, run, SimulatedPool(Machines(1, 0)), pairs).store
    whole = store.write(0, score_rows(shard_rows))
    for first in range(shard_rows, pairs - shard_rows + 1, shard_rows):
        link(store, whole, first)
    if rest := pairs % shard_rows:
        store.write(pairs - rest, score_rows(rest))
    parts: dict[int, bytes] = {}
    for number, first in enumerate(range(0, pairs, PART_ROWS)):
        rows = min(PART_ROWS, pairs - first)
        if rows not in parts:
            ids = (pair_ids(shard_rows) * (rows // shard_rows + 1))[:rows]
            part = random_part(np.random.default_rng(0), 0, rows)[0]
            parts[rows] = bytes(parquet_bytes(part.set_column(0, part.schema.field(0), [ids])))
        file = run.pairs / f"part-{number:05d}.parquet"
        file.fs.link(file.path, parts[rows])  # type: ignore[union-attr]
    return run, store


def of_scoring(size: Size) -> Lines:
    """Many workers with spot losses, by shard size."""
    seconds, listed, mebibytes = apart(dispatch, size.dispatched) if size.dispatched else (0.004, 0, 0)
    machines, pairs = Machines(size.workers, seconds), size.pairs
    return [
        f"**{size.workers} workers score {pairs:,} pairs** on nodes of {machines.node_gpus}, each lost "
        f"every {machines.hours_between_losses:g} hours; the driver is killed once, half way.",
        *table(
            "shard_rows", "s a shard", "minutes", "nodes lost", "lost work", "idle workers", "rounds",
            "requests", "driver's processor",
        ),
        *(_scored(machines, pairs, shard_rows) for shard_rows in (512, 2048, 8192)),
        "",
        f"A worker scores {machines.pairs_per_second:g} pairs a second and starts for "
        f"{machines.start_seconds:g} s, also after the kill; a node comes after "
        f"{machines.new_node_seconds:g} s. "
        f"The driver needs {1000 * seconds:.1f} ms a shard, measured with {size.dispatched:,} shards, Ray "
        f"Data and actors that do nothing; to list them {listed:.1f} s and {mebibytes:,.0f} MiB.",
    ]  # fmt: skip


def _scored(machines: Machines, pairs: int, shard_rows: int) -> str:
    new_bucket()
    config, before = config_of(score={"shard_rows": shard_rows, "workers": machines.workers}), Bucket.requests
    half = pairs / machines.pairs_per_second / machines.workers / 2
    pool = SimulatedPool(machines, stop_at=machines.start_seconds + half)
    done = SimulatedScore(config, RunDir(config.run_dir), pool, pairs).score()
    worked, every = done.useful + done.lost, done.seconds * machines.workers
    return (
        f"| {shard_rows} | {shard_rows / machines.pairs_per_second:.1f} | {done.seconds / 60:.1f} "
        f"| {done.losses} | {done.lost / worked:.2%} | {1 - worked / every:.1%} | {done.rounds} "
        f"| {Bucket.requests - before:,} | {machines.shard_seconds * pairs / shard_rows / done.seconds:.0%} |"
    )


def dispatch(shards: int) -> tuple[float, float, float]:
    """(seconds of the driver's processor a shard, seconds and MiB to list the shards), by Ray Data."""
    os.environ["RAY_ADDRESS"] = "local"
    from pipelines.runtime import pool
    from pipelines.runtime.cluster import connect

    connect()
    given = [(512 * number, 512) for number in range(shards)]
    pool.shard_dataset(given[:10])  # imports
    before, begun = peak_memory(), time.process_time()
    pool.shard_dataset(given)
    listed, grown = time.process_time() - begun, peak_memory() - before
    store = ShardStore(new_bucket(), SCORE_SCHEMA, {})
    work = pool.ShardWork("score", NoWork, {}, store, 512 * shards, 512)
    begun = time.process_time()
    pool.RayPool("score", 2, 0, 60).make_shards(work, given, 0)
    return (time.process_time() - begun - listed) / shards, listed, grown


def of_sweep(size: Size) -> Lines:
    """A sweep on object storage: what its decisions take, by the number of trials that there are."""
    trials = size.trials[0]
    decisions, ends = sweep(trials)
    requests = sum(one.requests for one in decisions)
    rows = [
        "**Decisions of a sweep on object storage**, by the trials that there are: seconds of a processor / "
        "requests in a row / seconds with those of the bucket.",
        *table(
            "trials", "are some missing", "a new trial", "a rung is recorded", "is it promoted", "requests"
        ),
    ]
    for number in size.trials:
        took = grown(number)
        cells = [f"{one.seconds:.2f} / {one.in_a_row:.0f} / {one.waits:.1f}" for one in took]
        rows.append(f"| {number} | {' | '.join(cells)} | {took[0].requests:,} |")
    return [
        *rows,
        "",
        f"The bucket answers after {1000 * LATENCY:.0f} ms. A complete sweep of {trials} trials, 16 at a "
        f"time and three rungs, took {len(decisions)} decisions and {requests:,} requests; "
        f"{ends[End.STOPPED]} trials were stopped, {ends[End.COMPLETED]} completed.",
    ]


def new_sweep(trials: int) -> Sweep:
    """A sweep of so many trials in a new bucket."""
    new_bucket()
    config = config_of(tune={"num_samples": trials})
    folder = Sweep(config, RunDir(config.run_dir), {"simulated": True})
    folder.begin()
    return folder


def grown(trials: int) -> list[Counted]:
    """The decisions of a sweep in which all but the last trial have two rungs."""
    folder, rng = new_sweep(trials), np.random.default_rng(0)
    for number in range(trials - 1):
        params = {"method.alpha": rng.uniform(0.5, 3), "method.beta": rng.uniform(0.02, 0.5)}
        root = folder.folder(f"{number:04d}").root
        write_manifest(root / "trial.json", folder.fingerprint, params=params, begun=0.0)
        for step in (100, 200):
            rung = Rung(step, measured(rng.uniform()), finished=0.0)
            write_manifest(root / "rungs" / f"{step:09d}.json", folder.fingerprint, **asdict(rung))
    found = []
    for decision in (
        folder.missing,
        folder.suggest,
        lambda: folder.record_rung(folder.trial(f"{trials - 1:04d}"), 100, measured(0.5)),
        lambda: folder.end_of(folder.trial(f"{trials - 1:04d}")),
    ):
        with counted() as took:
            decision()
        found.append(took)
    return found


def sweep(trials: int) -> tuple[list[Counted], Counter[End]]:
    """(each decision of a complete sweep, how many trials ended how)."""
    folder, rng = new_sweep(trials), np.random.default_rng(0)
    tune, decisions, at_work = folder.config.tune, list[Counted](), list[tuple[float, str]]()

    def decide(decision: Callable[[], Any]) -> Any:
        with counted() as found:
            result = decision()
        decisions.append(found)
        return result

    def begin(now: float) -> None:
        if decide(folder.missing):
            name = decide(folder.suggest).name
            heapq.heappush(at_work, (now + tune.rungs[0] * rng.uniform(0.8, 1.2), name))

    for _ in range(16):
        begin(0.0)
    while at_work:
        now, name = heapq.heappop(at_work)
        trial = folder.trial(name)
        reached = len(trial.rungs)
        safety = float(np.clip(trial.params["method.alpha"] / 3 + rng.normal(0, 0.1), 0, 1))
        decide(partial(folder.record_rung, trial, 100 * (1 + reached), measured(safety)))
        if decide(partial(folder.end_of, folder.trial(name))) == End.OPEN:
            more = tune.rungs[reached + 1] - tune.rungs[reached]
            heapq.heappush(at_work, (now + more * rng.uniform(0.8, 1.2), name))
        else:
            begin(now)
    found = folder.trials()
    return decisions, Counter(end_of(trial, found, tune) for trial in found)


def measured(safety: float) -> Measured:
    """What a trial shows that refuses no benign request."""
    of_safety, compliance = (Estimate(value, value, value, 100, "exact") for value in (safety, 1.0))
    return Measured(of_safety, compliance, 1.0, -0.05)


PARTS = {
    "driver": ("the driver of a scoring", of_driver),
    "scoring": ("workers that are lost while they score", of_scoring),
    "dealing": ("pairs dealt to many ranks", of_dealing),
    "checkpoints": ("checkpoints and losses", of_checkpoints),
    "sweep": ("decisions of a sweep", of_sweep),
    "memory": ("memory of 7B, 32B and 70B", of_memory),
}

if __name__ == "__main__":
    main()
