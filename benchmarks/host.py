"""What the host does for each token that a GPU forwards: everything of scoring and training but the model.

    OMP_NUM_THREADS=1 python -m benchmarks.host [--pairs 300000] [--scored 2048]

A model that computes nothing takes the place of the real one, and rows are planned for the width of
Qwen2-7B. Lengths are those of safety data. Beside it stand TRL's collator, which pads token ids that are
there already, and what a training worker reads before its first step, in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from bdpo.config import Config
from bdpo.data.pairs import ID_COLUMNS, prefix_groups, read_pairs
from bdpo.models.packing import Batch
from bdpo.models.row_layout import RowLayout
from bdpo.models.tokenizer import EncodedPair, load_tokenizer
from bdpo.scoring.reference import reference_logps
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan, deal_micro_batches
from bdpo.training.pairs import TrainingPairs
from benchmarks.common import (
    EMPTY_TURN,
    apart,
    cpu_seconds,
    make_model,
    write_section,
)
from benchmarks.peer import trl_batches
from benchmarks.random_pairs import BATCH, BUDGET, SHARD, prepared

HIDDEN_SIZE, WORKERS, STEPS = 3584, 8, 32
EMPTY = list(range(2, 2 + EMPTY_TURN))


def main() -> None:
    """Measure all of it and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300_000)
    parser.add_argument("--scored", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config, scores = prepared(Path(folder), arguments.pairs)
        os.environ["BDPO_CACHE"] = str(Path(folder) / "cache")  # no ids are there yet
        load, work = loading(config, scores), work_a_token(config, scores, arguments.scored)
    rows = [*work, "", *load]
    print(*rows, sep="\n")
    write_section("Host work", rows)


class NoModel:
    """A model of Qwen2-7B's width that outputs zeros."""

    layout = RowLayout(HIDDEN_SIZE, shared=True)
    model = make_model()

    def __call__(self, batch: Batch, means: bool = False) -> Any:
        """As LogpsModel."""
        responses = int(batch.responses[-1]) + 1
        return (torch.zeros(responses), torch.zeros(responses, 1)) if means else torch.zeros(responses)


def work_a_token(config: Config, scores: pa.Table, scored: int) -> list[str]:
    """Microseconds of CPU time a real token, each pass over the same pairs."""
    run, model = RunDir(config.run_dir), NoModel()
    shards = [read_pairs(run.pairs, first, SHARD) for first in range(0, scored, SHARD)]
    data = TrainingPairs.load(config, run, scores)
    plan = TrainingPlan(data.lengths, config.train, config.seed)
    dealt: list[list[int]] = []
    for step in range(STEPS):
        pairs = plan.global_batch(step)
        lengths = [int(plan.lengths[i]) for i in pairs]
        for worker in deal_micro_batches(pairs, lengths, BUDGET, WORKERS, model.layout):
            dealt += worker
    trained = [index for batch in dealt for index in batch]
    lists = [EncodedPair(*pair.values()) for shard in shards for pair in shard.select(ID_COLUMNS).to_pylist()]

    def scoring() -> None:
        for shard in shards:
            reference_logps(model, prefix_groups(shard), EMPTY, BUDGET)  # type: ignore[arg-type]

    def training() -> None:
        for batch in dealt:
            data.packed(batch).logps(model)

    def collator() -> None:
        for _ in trl_batches(lists):
            pass

    def masks() -> None:
        for batch in dealt:
            data.layout.pack(data.groups[batch]).attention_mask.dense()  # type: ignore[union-attr]

    works: dict[str, Callable[[], None]] = {
        "scoring": scoring, "training": training, "TRL": collator, "masks": masks,
    }  # fmt: skip
    seconds = cpu_seconds(works)
    of_shards = sum(prefix_groups(shard).lengths.sum() for shard in shards)
    responses = sum(prefix_groups(shard).lengths[:, 1:].sum() for shard in shards)
    tokens = {
        "scoring": int(of_shards + responses),
        "training": int(data.groups.lengths[trained].sum()),
        "TRL": sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in lists),
    }
    micro = {name: 1e6 * seconds[name] / tokens[name] for name in tokens}
    mask = 1e6 * seconds["masks"] / tokens["training"] - micro["training"]
    return [
        "| what | µs a token | against TRL's collator |",
        "|---|---|---|",
        f"| scoring: ids of a shard, plan, rows of all four terms, scores | **{micro['scoring']:.3f}** "
        f"| {micro['scoring'] / micro['TRL']:.2f} |",
        f"| training: pairs of a micro-batch, their rows and scores | **{micro['training']:.3f}** "
        f"| {micro['training'] / micro['TRL']:.2f} |",
        f"| the mask of these rows as a matrix, on a CPU; a GPU makes its own | {mask:.3f} | |",
        f"| TRL's collator, ids in lists | {micro['TRL']:.3f} | 1 |",
        "",
        f"CPU time of one thread, best of 3 in turn. Scoring: {len(shards)} shards of {SHARD} pairs, batches "
        f"of {BUDGET:,} tokens; training: {STEPS} steps of {BATCH} pairs for {WORKERS} workers.",
    ]


def loading(config: Config, scores: pa.Table) -> list[str]:
    """What a worker's pairs take before its first step, the first time on a machine and afterwards."""
    first, again = (apart(load, config, scores) for _ in range(2))
    data = TrainingPairs.load(config, RunDir(config.run_dir), scores)
    some = list(range(0, len(data), len(data) // BATCH))[:BATCH]
    works = {"table": lambda: scores.take(some), "arrays": lambda: data.known[torch.tensor(some)].unbind(1)}
    seconds = cpu_seconds({name: partial(_repeat, work) for name, work in works.items()})
    return [
        "| pairs | load, first on a machine, s | load, s | memory of it, MiB | 64 scores out of all, ms "
        "| out of a table, ms |",
        "|---|---|---|---|---|---|",
        f"| {len(data):,} | {first[0]:.2f} | **{again[0]:.2f}** | **{again[1]:.0f}** "
        f"| **{10 * seconds['arrays']:.3f}** | {10 * seconds['table']:.2f} |",
        "",
        "Seconds of the clock; memory that the process holds for it, beyond the imports and the scores. "
        f"The ids are {4 * int(data.groups.lengths.sum()) / 2**20:,.0f} MiB; a process maps what it uses.",
    ]


def load(config: Config, scores: pa.Table) -> tuple[float, float]:
    """(seconds, MiB) of the pairs of a worker."""
    load_tokenizer(config.model)  # imports
    held, begun = _held(), time.perf_counter()
    data = TrainingPairs.load(config, RunDir(config.run_dir), scores)
    seconds = time.perf_counter() - begun
    return seconds, (_held() - held) if len(data) else 0.0


def _held() -> float:
    """MiB of memory that this process has now, mapped pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _repeat(work: Callable[[], Any]) -> None:
    for _ in range(100):
        work()


if __name__ == "__main__":
    main()
