"""Scoring on Ray Data's pool of actors: against the same scorer in a plain loop, and one actor against two.

    python -m benchmarks.pool [--pairs 384] [--data FILE]

The pairs have the lengths of `benchmarks.scoring`, with words of the sandbox for their tokens. Counted from
the moment that every actor has done its first shard, so actors are warm. On a machine that others use, the
clock tells of them: the load before each pass is printed, and processor time counts all that the pass and
Ray's own processes took. What a second core of this machine is worth is measured by two plain loops side
by side: two actors can gain no more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bdpo.config import Config, ModelConfig, parse_config
from bdpo.data.pairs import count_pairs
from bdpo.models.tokenizer import EncodedPair, load_tokenizer
from bdpo.sandbox.world import make_world
from bdpo.scoring.scores import finish_scores, score_fingerprint, score_store
from bdpo.scoring.shard_scorer import ShardReport, ShardScorer
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import Shard
from benchmarks.common import (
    MAX_LENGTH,
    MAX_PROMPT_LENGTH,
    TOKENS_PER_BATCH,
    data_sets,
    from_file,
    make_model,
    write_section,
)
from pipelines.prepare import Prepare
from pipelines.runtime.pool import RayPool, shard_dataset

ROUNDS = 2
SPREAD = "safety-like, spread 0.3"


class TimedReport(ShardReport):
    """A report with its actor, and the time of the clock."""

    worker: str
    ended: float


class TimedScorer(ShardScorer):
    """Says who ended which shard when."""

    def __call__(self, shard: Shard) -> TimedReport:
        return {**super().__call__(shard), "worker": self.name, "ended": time.time()}


@dataclass
class Pass:
    """One pass over all shards: per shard of warm actors, and the load of the machine before."""

    seconds: float
    cpu_seconds: float
    load: float
    padded: float


def main() -> None:
    """Measure every data set and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--shard-rows", type=int, default=16)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets, notes = {SPREAD: data_sets(arguments.pairs)[SPREAD]}, []
    if arguments.data:
        sets[arguments.data.name], note = from_file(arguments.data, arguments.pairs)
        notes = ["", note]
    rows = [
        "| data set | s/shard plain | Ray, 1 actor | **ratio** | CPU s plain | Ray | **ratio** "
        "| 2 loops / 1 | 2 actors / 1 | padded/real | load before |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(name, pairs, arguments.shard_rows) for name, pairs in sets.items()),
        "",
        f"Best of {ROUNDS} rounds in turn, {os.cpu_count()} cores; seconds of the clock, then of processors. "
        "Load is that of the last minute, the passes before included: on free cores it is at most 2. "
        "2 loops / 1 is what a second core of this machine is worth without Ray.",
        *notes,
    ]
    print(*rows, sep="\n")
    write_section("Scoring: on a pool of actors", rows)


def _row(name: str, pairs: list[EncodedPair], shard_rows: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config, run = _prepared(Path(folder), pairs, shard_rows)
        passes: dict[str, list[Pass]] = {"plain": [], "loops": [], "one": [], "two": []}
        for _ in range(ROUNDS):
            passes["plain"].append(plain(config, run))
            passes["loops"].append(two_loops(config, run))
            passes["one"].append(on_ray(config, run, 1))
            passes["two"].append(on_ray(config, run, 2))
    clock = {way: min(one.seconds for one in of_way) for way, of_way in passes.items()}
    cpu = {way: min(one.cpu_seconds for one in of_way) for way, of_way in passes.items()}
    loads = "/".join(f"{min(one.load for one in of_way):.1f}" for of_way in passes.values())
    return (
        f"| {name}, {len(pairs)} pairs | {clock['plain']:.2f} | {clock['one']:.2f} "
        f"| **{clock['one'] / clock['plain']:.2f}** | {cpu['plain']:.2f} | {cpu['one']:.2f} "
        f"| **{cpu['one'] / cpu['plain']:.2f}** | {clock['plain'] / clock['loops']:.2f} × "
        f"| {clock['one'] / clock['two']:.2f} × "
        f"| {passes['plain'][0].padded:.3f} | {loads} |"
    )


def _prepared(folder: Path, pairs: list[EncodedPair], shard_rows: int) -> tuple[Config, RunDir]:
    """A run folder with pairs of these lengths, and a model that knows the sandbox's words."""
    chat = load_tokenizer(ModelConfig(name_or_path="sandbox"))
    make_model(len(chat.tokenizer)).save_pretrained(folder / "model")
    chat.tokenizer.save_pretrained(folder / "model")
    rng, words = random.Random(0), make_world(0).words()

    def text(tokens: int) -> str:
        return " ".join(rng.choices(words, k=max(1, tokens)))

    template = len(chat.unconditional_ids("empty_turn"))
    with (folder / "pairs.jsonl").open("w") as data:
        for pair in pairs:
            texts = {"prompt": text(len(pair.prompt) - template)}
            texts |= {side: text(len(getattr(pair, side)) - 1) for side in ("chosen", "rejected")}
            data.write(json.dumps(texts) + "\n")
    values = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "path": str(folder / "pairs.jsonl"),
            "max_length": MAX_LENGTH,
            "max_prompt_length": MAX_PROMPT_LENGTH,
            "max_bad_fraction": 1.0,
        },
        "score": {"tokens_per_batch": TOKENS_PER_BATCH, "shard_rows": shard_rows, "gpus_per_worker": 0},
    }
    config = parse_config(values, "benchmark")
    run = RunDir(config.run_dir)
    run.open(config).release()
    Prepare(config, run).complete()
    return config, run


def plain(config: Config, run: RunDir) -> Pass:
    """One ShardScorer, shard after shard, in this process."""
    load, missing = _start(config, run)
    return _pass(config, run, *_loop(config, run, missing), load)


def two_loops(config: Config, run: RunDir) -> Pass:
    """Two of them, each with every other shard in a process of its own."""
    load, missing = _start(config, run)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        loops = processes.map(_loop, [config] * 2, [run] * 2, [missing[::2], missing[1::2]])
        shards = [shard for done, cpu in loops for shard in zip(done, cpu, strict=True)]
    shards.sort(key=lambda shard: shard[0]["ended"])
    return _pass(config, run, [shard for shard, _ in shards], [cpu for _, cpu in shards], load)


def _loop(
    config: Config, run: RunDir, shards: list[tuple[int, int]]
) -> tuple[list[dict[str, Any]], list[float]]:
    """(reports of the scorer for each shard, processor time after each)."""
    torch.set_num_threads(1)
    scorer = TimedScorer(config, run, score_fingerprint(config, run), "cpu")
    done, cpu = [], []
    for first, rows in shards:
        done.append(scorer({"first": first, "rows": rows}))
        cpu.append(time.process_time())
    return done, cpu


def on_ray(config: Config, run: RunDir, actors: int) -> Pass:
    """Ray Data with a pool of so many."""
    load, missing = _start(config, run)
    arguments = {"config": config, "run": run, "fingerprint": score_fingerprint(config, run)}
    dataset = RayPool("score", actors, 0, config.score.stall_seconds).map(
        shard_dataset(missing), TimedScorer, arguments
    )
    done, cpu = [], []
    for shard in dataset.iter_rows():
        done.append(shard)
        cpu.append(_cpu_of_all())
    return _pass(config, run, done, cpu, load)


def _start(config: Config, run: RunDir) -> tuple[float, list[tuple[int, int]]]:
    shutil.rmtree(run.scores, ignore_errors=True)
    store = score_store(run, score_fingerprint(config, run))
    return os.getloadavg()[0], store.missing(count_pairs(run.pairs), config.score.shard_rows)


def _pass(config: Config, run: RunDir, done: list[dict[str, Any]], cpu: list[float], load: float) -> Pass:
    first_of_each = {shard["worker"]: shard["ended"] for shard in reversed(done)}
    warm = max(first_of_each.values())
    after = [(shard["ended"], spent) for shard, spent in zip(done, cpu, strict=True) if shard["ended"] > warm]
    spent_before = [spent for shard, spent in zip(done, cpu, strict=True) if shard["ended"] <= warm]
    workers = finish_scores(run, score_fingerprint(config, run), 0)["workers"].values()
    return Pass(
        seconds=(max(ended for ended, _ in after) - warm) / len(after),
        cpu_seconds=(cpu[-1] - max(spent_before)) / len(after),
        load=load,
        padded=sum(work["tokens_forwarded"] for work in workers) / sum(work["tokens"] for work in workers),
    )


def _cpu_of_all() -> float:
    """Processor seconds of this process and of all that it started: Ray's own and the actors."""
    total = 0.0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
