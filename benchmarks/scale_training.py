"""The training's side of `benchmarks.scale`: dealing, checkpoints, and memory by the planner."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bdpo.config import TrainConfig
from bdpo.models.row_layout import RowLayout
from bdpo.models.transformers_private import set_attention
from bdpo.training import memory
from bdpo.training.batches import TrainingPlan, deal_micro_batches
from benchmarks.common import apart, peak_memory
from benchmarks.simulated import QUICK, Lines, Size, Trainers, config_of, table, trained

HIDDEN_SIZE, TOKENS_PER_SECOND = 3584, 10_000  # of a 7B model; trained on an H200 at 42 % of its peak

STALL = 0.17  # seconds in which a GB of a part of a checkpoint is copied: `benchmarks.saving`, on CPU

MODELS: dict[str, dict[str, Any]] = {
    "7B": memory.KNOWN_SHAPES["Qwen/Qwen2-7B-Instruct"],
    "32B": {  # Qwen2.5-32B
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648,
        "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "70B": {  # Llama 3.1 70B
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
}  # fmt: skip

SAVE_MINUTES = (0.5, 2, 5, 15, 60)

GPU = 79  # GiB of a GPU of 80 GB, of which a tenth is left free


def of_dealing(size: Size) -> Lines:
    """The plan of a step on every rank, and of an evaluation on held-out pairs."""
    pairs, (planned, mebibytes) = size.pairs, apart(dealing, size)
    return [
        f"**A step of {pairs:,} pairs on every rank:** the plan is made beside the step before it.",
        *table(
            "ranks", "batch", "busiest / mean, tokens", "longest pair / mean", "ms to plan",
            "ms of the step, 7B",
        ),
        *planned,
        "",
        f"Plan and lengths take {mebibytes:,.0f} MiB of each rank at their peak. {_held_out(size)}",
    ]  # fmt: skip


def dealing(size: Size) -> tuple[Lines, float]:
    """(a row for each of `size.ranks`, MiB of the plan) in a process of its own."""
    layout, rng = RowLayout(HIDDEN_SIZE, shared=True), np.random.default_rng(0)
    before = peak_memory()
    lengths = _lengths(rng, size.pairs)
    found, steps = [], 5
    for ranks, batch in size.ranks:
        plan = TrainingPlan(lengths, TrainConfig(global_batch_size=batch), 0)
        plan.global_batch(0)
        begun = time.process_time()
        dealt = [plan.micro_batches(step, ranks, layout) for step in range(steps)]
        milliseconds = 1000 * (time.process_time() - begun) / steps
        loads = np.array(
            [[sum(int(lengths[i]) for b in worker for i in b) for worker in step] for step in dealt]
        )
        mean, busiest = loads.mean(), loads.max(1).mean()
        longest = np.mean([lengths[plan.global_batch(step)].max() for step in range(steps)])
        found.append(
            f"| {ranks} | {batch} | {busiest / mean:.3f} | {longest / mean:.2f} | {milliseconds:.1f} "
            f"| {1000 * busiest / TOKENS_PER_SECOND:,.0f} |"
        )
    return found, peak_memory() - before


def _lengths(rng: np.random.Generator, pairs: int) -> np.ndarray:
    """Tokens of pairs as long as safety data."""
    lengths = np.full(pairs, 20)
    for mean in (3.2, 4.65, 4.65):
        lengths += np.minimum(np.exp(rng.normal(mean, 0.6, pairs)), 400).astype(np.int64)
    return lengths


def _held_out(size: Size) -> str:
    layout, (ranks, _) = RowLayout(HIDDEN_SIZE, shared=True), max(size.ranks)
    took = []
    for pairs in size.held_out:
        lengths = _lengths(np.random.default_rng(1), pairs).tolist()
        begun = time.process_time()
        deal_micro_batches(range(pairs), lengths, TrainConfig().tokens_per_micro_batch, ranks, layout)
        took.append(f"{pairs:,} in {time.process_time() - begun:.1f} s")
    return f"Held-out pairs are dealt to {ranks} ranks, at each evaluation: {', '.join(took)}."


def of_checkpoints(size: Size) -> Lines:
    """What losses and checkpoints cost a training, by the minutes between checkpoints."""
    config, steps = config_of(model={"name_or_path": "m", "dtype": "bfloat16"}), 200_000
    whole = memory.checkpoint_bytes(config, shape_of("7B"))
    rows = [
        f"**{steps:,} steps of a 7B model on nodes of 8 GPUs**, 8 pairs a GPU and step, each node lost every "
        "12 hours (spot) or 1,000: share of the time that is lost or spent on checkpoints of "
        f"{whole / 1e9:.0f} GB.",
        *table(
            "nodes", "hours between losses", *(f"{n} minutes" for n in SAVE_MINUTES), "losses, hours at 15"
        ),
    ]
    for nodes in size.nodes:
        for hours in (12, 1000):
            trainers = Trainers(nodes, 8 * 300 / TOKENS_PER_SECOND, STALL * whole / 1e9 / (8 * nodes), hours)
            saves = [round(60 * minutes / trainers.step_seconds) for minutes in SAVE_MINUTES]
            done = [trained(trainers, steps, save_steps) for save_steps in saves]
            cells = [f"{1 - one.useful / one.seconds:.1%}" for one in done]
            shown = done[SAVE_MINUTES.index(15)]
            rows.append(
                f"| {nodes} | {hours} | {' | '.join(cells)} | {shown.losses}, {shown.seconds / 3600:.1f} |"
            )
    return [
        *rows,
        "",
        f"Training stops for {STALL} s a GB of a worker's part; after a loss it starts again within "
        f"{trainers.start_seconds:g} s.",
    ]


def of_memory(size: Size) -> Lines:
    """The first settings, fastest first, whose memory leaves a tenth of a GPU of 80 GB free."""
    rows = [
        f"**Settings that fit GPUs of {GPU} GiB with a tenth to spare**, by the planner: ZeRO-3, bfloat16, "
        "pairs of 1,024 tokens.",
        *table(
            "model", "GPUs", "layers recomputed", "tokens_per_micro_batch", "offload", "GiB of each GPU",
            "GiB of host memory each", "checkpoint, GB", "weights alone, GiB: scoring and answers",
        ),
    ]  # fmt: skip
    for name in MODELS if size != QUICK else ():
        activations: dict[tuple[bool, int], int] = {}
        rows += [_fitting(name, gpus, activations) for gpus in (8, 64, 512)]
    return rows


def _fitting(name: str, gpus: int, activations: dict[tuple[bool, int], int]) -> str:
    shape = shape_of(name)
    for train in _settings(gpus):
        config = config_of(model={"name_or_path": "m", "dtype": "bfloat16"}, train=train)
        need = memory.memory_need(config, shape)
        if need.gpu_total <= 0.9 * GPU * memory.GIB:
            break
    else:
        return f"| {name} | {gpus} | none fits |" + " |" * 6
    return (
        f"| {name} | {gpus} | {'yes' if train['gradient_checkpointing'] else 'no'} "
        f"| {train['tokens_per_micro_batch']} | {train['offload'] or 'none'} "
        f"| {need.gpu_total / memory.GIB:.0f} | {need.host_total / memory.GIB:.0f} "
        f"| {memory.checkpoint_bytes(config, shape) / 1e9:,.0f} | {2 * need.parameters / memory.GIB:.0f} |"
    )


def _settings(gpus: int) -> Iterator[dict[str, Any]]:
    """Sections `train`, the fastest first: recomputing costs a third of the work, offloading a CPU's step."""
    for offload in (None, "cpu"):
        for recomputed, tokens in ((False, 7168), (True, 16384), (True, 8192), (True, 4096)):
            yield {
                "workers": gpus, "gradient_checkpointing": recomputed,
                "tokens_per_micro_batch": tokens, "offload": offload,
            }  # fmt: skip


def shape_of(name: str) -> Any:
    """The architecture of one of `MODELS`."""
    from transformers import AutoConfig

    values = dict(MODELS[name])
    shape = AutoConfig.for_model(values.pop("model_type"), **values)
    set_attention(shape, "sdpa")
    return shape
