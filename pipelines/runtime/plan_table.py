"""What a training will do and need, as a table, before anything is taken; not a command of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from bdpo.cluster.status import expected_pairs
from bdpo.config import Config, workers_label
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import plan_without_lengths
from bdpo.training.memory import (
    GIB,
    MemoryNeed,
    gpu_memory,
    memory_need,
    model_shape,
    require_gpu_memory,
)
from bdpo.training.reestimation import estimation_steps
from bdpo.training.step_time import GPU, PAIR, StepTime, estimation_share, step_time
from pipelines.runtime.progress import console

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def print_plan(config: Config, pairs: int | None = None) -> None:
    """Print steps and memory of the training over so many pairs, the held-out ones among them.

    Raises:
        UserError: the warmup takes all steps, a GPU is known to be too small, or the model's config.json is
            not found.
    """
    if pairs is None:
        pairs = expected_pairs(config, RunDir(config.run_dir))
    hf_config, remark = model_shape(config)
    need = memory_need(config, hf_config)
    console.print(_batch_table(config, pairs, hf_config))
    console.print(_memory_table(config, need))
    if config.train.gpus_per_worker and not config.train.offload:  # a CPU's step of AdamW is not modelled
        console.print(_step_table(step_time(config, hf_config)))
    if remark:
        console.print(f"{config.model.name_or_path}: {remark}", soft_wrap=True)
    require_gpu_memory(config, need, gpu_memory(config.train))


def require_memory(config: Config) -> None:
    """Raise a UserError if a GPU is known to be too small for the training."""
    if (known := gpu_memory(config.train)) is not None:
        require_gpu_memory(config, memory_need(config, model_shape(config)[0]), known)


def _batch_table(config: Config, pairs: int | None, hf_config: PreTrainedConfig) -> Table:
    train = config.train
    table = Table(title="training", title_justify="left", show_header=False)
    per_worker = f"{train.gpus_per_worker:g} GPU" if train.gpus_per_worker else "1 CPU"
    table.add_row("workers", f"{workers_label(train.workers)} x {per_worker}, ZeRO stage {train.zero_stage}")
    table.add_row("batch", f"{train.global_batch_size} pairs a step")
    table.add_row("micro-batch", f"{train.tokens_per_micro_batch:,} tokens on each worker")
    if pairs is None:
        table.add_row("pairs", "not known before the data are read")
    else:
        plan = plan_without_lengths(pairs, train, config.seed)
        steps = f"{plan.total_steps:,}, {plan.steps_per_epoch:,} an epoch, {plan.warmup_steps} to warm up"
        table.add_row("pairs", f"{len(plan.lengths):,}")
        table.add_row("steps", steps)
        if times := len(estimation_steps(config, plan)):
            share = estimation_share(config, hf_config)
            row = f"estimated {times:,} more times, each {share:.2f} of an epoch's operations, modelled"
            table.add_row("mutual information", row)
    return table


def _step_table(step: StepTime) -> Table:
    title = (
        f"an optimizer step on {GPU}, modelled and not measured, pairs of {'+'.join(map(str, PAIR))} tokens"
    )
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("tokens of a worker", f"{step.tokens:,} in {step.micro_steps} micro-steps")
    table.add_row("GPU", f"{1000 * step.gpu:.0f} ms: {step.operations / 1e12:.0f} TFLOP, {_gb(step.traffic)}")
    table.add_row("host", f"{1000 * step.host:.0f} ms: kernels, hooks of ZeRO")
    table.add_row("communication", f"{1000 * step.network:.0f} ms: {_gb(step.communication)} a worker")
    table.add_row("step, if they overlap", f"{1000 * step.seconds:.0f} ms, MFU {step.mfu:.2f}")
    return table


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _memory_table(config: Config, need: MemoryNeed) -> Table:
    title = f"memory of each worker: {need.parameters / 1e9:.2f} billion parameters, {config.model.dtype}"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("GPU, GiB" if config.train.gpus_per_worker else "CPU, GiB", justify="right")
    table.add_column(config.train.offload or "host", justify="right")
    for what in dict.fromkeys([*need.gpu, *need.host]):
        gpu, host = (side.get(what) for side in (need.gpu, need.host))
        table.add_row(what, *("" if x is None else f"{x / GIB:.2f}" for x in (gpu, host)))
    table.add_section()
    known = gpu_memory(config.train)
    total = f"{need.gpu_total / GIB:.2f}" + (f" of {known / GIB:.0f}" if known else "")
    table.add_row("total", total, f"{need.host_total / GIB:.2f}" if need.host else "")
    return table
