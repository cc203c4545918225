"""Training at 7B in bfloat16: ZeRO-3 on one rank, activation checkpointing, with and without CPU offload.

`python -m benchmarks.gpu training`. A step is all that `bdpo.training.loop` does for it: tokenising,
forward and backward of all micro-batches, the optimizer, the metrics. MFU is 6N a real token (a prompt
counted once, nothing for what is computed again), of the whole step and of the step without the
optimizer. Memory stands beside what `bdpo.training.memory` expects. Left out: Ray Train
(`benchmarks.ray_train`), checkpoints.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from bdpo.cluster.node_checks import check_host, check_memory
from bdpo.cluster.nodes import node_facts
from bdpo.config import Config
from bdpo.models.transformers_private import attention_of_config
from bdpo.storage.run_dir import RunDir
from bdpo.training.engine import build_engine
from bdpo.training.loop import train_step
from bdpo.training.memory import GIB, memory_need, model_shape
from benchmarks.gpu.record import Row, mfu, not_measured, shown, verdict
from benchmarks.gpu.runs import plan_of, run_config, score, scored, start_process_group
from benchmarks.gpu.setup import Clock, Setup, multiplying_parameters, peak_memory, profiled

CASES = ("7b scoring", "7b bdpo, optimizer on the CPU", "7b bdpo")


def measure(case: str, setup: Setup) -> Iterator[Row]:
    """The one row of a case, named `<shape> scoring` or `<shape> bdpo[, optimizer on the CPU]`."""
    name, what = case.split(" ", 1)
    pairs = (setup.warm_up + setup.steps) * setup.pairs_a_step  # one epoch
    steps = setup.warm_up + setup.steps
    offload = "cpu" if "optimizer on the CPU" in what else None
    config = run_config(setup, name, pairs, max_steps=steps, offload=offload, gradient_checkpointing=True)
    if what == "scoring":
        yield score(config, setup) | peak_memory(setup.device)
    else:
        yield training(config, setup, name, case)


def training(config: Config, setup: Setup, name: str, case: str) -> Row:
    """Steps of the training loop, the first ones not counted.

    Raises:
        UserError: as before every training, GPU or host are known to have too little memory.
        NotMeasured: the pairs are not scored.
    """
    need = memory_need(config, model_shape(config)[0])
    run, here = RunDir(config.run_dir), [node_facts("here", None, "", ())]
    check_memory(config, run, here)
    check_host(config, run, here)
    data = scored(config, f"{name} scoring")
    plan, started = plan_of(data), time.perf_counter()
    start_process_group(setup)
    engine = build_engine(config, plan.total_steps, plan.warmup_steps)
    row: Row = {
        "pairs_a_step": setup.pairs_a_step,
        "attention": attention_of_config(engine.module.model.config),
        "seconds_to_build": time.perf_counter() - started,
        "expected_gib": need.gpu_total / GIB,
        "expected_host_gib": need.host_total / GIB,
    }
    losses = [train_step(engine, data, data.step(plan, step))["loss"] for step in range(setup.warm_up)]
    clock, optimizer = Clock(setup.device), Clock(setup.device)
    engine.step = marked(engine.step, optimizer)
    clock.mark()
    for step in range(setup.warm_up, plan.total_steps):
        train_step(engine, data, data.step(plan, step))
        clock.mark()
    tokens = sum(data.tokens(plan.global_batch(step)) for step in range(setup.warm_up, plan.total_steps))
    in_optimizer = sum(optimizer.seconds()[::2]) / setup.steps
    row |= {"step_0_off": abs(losses[0] - math.log(2)), "seconds_in_optimizer": in_optimizer}
    row |= step_row(setup, name, clock.seconds(), tokens / setup.steps)
    without = row["seconds_a_step"] - in_optimizer
    row["mfu_without_optimizer"] = mfu(setup.machine, 6 * row["N"] * row["tokens_a_step"], without)
    profiled(setup, case, lambda: train_step(engine, data, data.step(plan, plan.total_steps)))
    return row


def marked(function: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """The same with a mark before and after every call."""

    def call(*arguments: Any, **names: Any) -> Any:
        clock.mark()
        result = function(*arguments, **names)
        clock.mark()
        return result

    return call


def step_row(setup: Setup, name: str, seconds: list[float], tokens: float) -> Row:
    """The figures of some steps of `tokens` real tokens each, ours or TRL's."""
    weights, mean = multiplying_parameters(setup.shape(name)), statistics.mean(seconds)
    return {
        "N": weights,
        "seconds": seconds,
        "seconds_a_step": mean,
        "tokens_a_step": tokens,
        "tokens_per_second": tokens / mean,
        "mfu": mfu(setup.machine, 6 * weights * tokens, mean),
        **peak_memory(setup.device),
    }


def table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    """For people."""
    steps = {row["case"]: row for row in rows if "seconds_a_step" in row}
    lines = [
        "| training | s/step | of it optimizer | real tokens/s | MFU, % | without optimizer, % "
        "| peak GiB | expected | step-0 off by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in steps.items():
        lines.append(
            f"| {case} ({row['attention']}) | {row['seconds_a_step']:.2f} "
            f"| {row['seconds_in_optimizer']:.2f} | {row['tokens_per_second']:,.0f} | {shown(row['mfu'])} "
            f"| {shown(row['mfu_without_optimizer'])} | {shown(row['peak_gib'])} | {row['expected_gib']:.1f} "
            f"| {row['step_0_off']:.1e} |"
        )
    weights = next((row["N"] / 1e9 for row in steps.values()), None)
    lines += [
        "",
        f"MFU: 6N a real token, N = {shown(weights, '.2f')} billion, of {machine['peak_tflops']} TFLOP/s; "
        "what is computed again in backward is not counted. Expected: the memory of `bdpo.training.memory`.",
        "",
    ]
    best = max(steps.values(), key=lambda row: row["mfu"] or 0, default={})
    a_pair = min((row["seconds_a_step"] / row["pairs_a_step"] for row in steps.values()), default=None)
    scoring = next((row["seconds_a_pair"] for row in rows if "seconds_a_pair" in row), None)
    share = scoring / a_pair if scoring and a_pair else None
    off = max((row["step_0_off"] for row in steps.values()), default=None)
    return [
        *lines,
        verdict("training MFU, %", best.get("mfu"), 40, at_least=True),
        verdict("scoring / one epoch, seconds", share, 0.5),
        verdict("step-0 |loss − ln 2|", off, 1e-3),
        *not_measured(rows),
    ]
